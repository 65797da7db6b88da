"""A trial while it runs: what it asks for, what it reports, and whether it may go on."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from trimtab.errors import UsageError
from trimtab.tune.search.desk import Ticket
from trimtab.tune.search.space import Dimension, Value, dimension_from_json, dimension_of
from trimtab.tune.search.verdict import Losses

Tell = Callable[[int, float], None]
"""Hears of a trial's steps and their losses."""


class Stopped(Exception):
    """Raised inside a trial that is not worth going on.

    Attributes:
        step: where it stood.
        finding: the doctor's, as JSON data; None where the trial was only behind the others.
    """

    def __init__(self, step: int, reason: str, finding: dict[str, Any] | None = None) -> None:
        super().__init__(reason)
        self.step = step
        self.finding = finding


class Ongoing:
    """A running trial: the argument of an objective.

    Attributes:
        number: from 0.
        folder: where it may write; a `trimtab.Watch` that records there is examined by the doctor at the end.
        values: what was drawn for it, by name.
    """

    def __init__(self, plan: Mapping[str, Any], ticket: Ticket, folder: Path, tell: Tell) -> None:
        self.number = ticket.number
        self.folder = folder
        self.values: dict[str, Value] = dict(ticket.values)
        self.losses = Losses()
        self.asked: set[str] = set()
        self._plan = plan
        self._trial = ticket.trial
        self._tell = tell
        self._finite: list[float] = []

    def suggest(
        self,
        name: str,
        low: float | Sequence[Value],
        high: float | None = None,
        *,
        log: bool = False,
        integer: bool = False,
        step: float = 0.0,
    ) -> Value:
        """Draw a value; the same name gives the same value again. What the tuning's space says of a name counts.

        Args:
            name: of the value.
            low: the lowest value, or a sequence of choices.
            high: the highest value.
            log: whether equal ratios are equally likely.
            integer: whether only whole numbers are drawn.
            step: the distance between values; 0 for none.

        Returns:
            The value.

        Raises:
            UsageError: if the range or the choices are not usable, or differ from those of an earlier trial.
        """
        return self.draw(name, dimension_of(name, low, high, log=log, integer=integer, step=step))

    def draw(self, name: str, dimension: Dimension) -> Value:
        """Draw a value from a dimension; see `suggest`.

        Raises:
            UsageError: if an earlier trial had something of another kind under that name.
        """
        self.asked.add(name)
        if name in self.values:
            return self.values[name]
        declared = self._plan["space"].get(name)
        dimension = dimension if declared is None else dimension_from_json(declared)
        try:
            self.values[name] = dimension.suggest(self._trial, name)
        except ValueError as error:
            raise UsageError(f"{name} cannot be drawn from {dimension}: {' '.join(str(error).split())}") from None
        return self.values[name]

    def report(self, value: float, step: int) -> None:
        """Report the metric on the way.

        Args:
            value: of the metric that is tuned.
            step: whole, rising.

        Raises:
            Stopped: if the trial is lost or, where that was asked for, behind the median; leave it be.
            UsageError: if the step is negative.
        """
        value, step = float(value), int(step)
        if step < 0:
            raise UsageError(f"step of a report should be at least 0, got {step}.")
        if math.isfinite(value):
            self._finite.append(value)
        lower = not self._plan["maximize"]
        if lower or not math.isfinite(value):
            self.losses.add(step, value)
        self._tell(step, value)
        if not self._plan["prune"]:
            return
        if (finding := self.losses.fatal()) is not None:
            raise Stopped(step, f"{finding['name']}: {finding['cause']}", finding)
        if self._plan["median"] and self.behind(value, step):
            raise Stopped(step, f"behind the median of the trials before it at step {step}")

    def behind(self, value: float, step: int) -> bool:
        """Return whether the trial is behind the median of the earlier ones at that step."""
        self._trial.report(value, step)
        return bool(self._trial.should_prune())

    @property
    def initial(self) -> float | None:
        """The first finite value that was reported: what a run that is lost counts as."""
        return self._finite[0] if self._finite else None

    @property
    def latest(self) -> float | None:
        """The last finite value that was reported."""
        return self._finite[-1] if self._finite else None
