"""The sizes of a model that a sweep goes over: every width with every depth."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trimtab.compare.arm import Arm
from trimtab.errors import UsageError
from trimtab.workloads import Workload

_MOST = 100


@dataclass(frozen=True)
class Size:
    """A width and a depth; 0 where the sweep leaves the workload's own.

    Example:
        >>> Size(width=32).label, Size().label
        ('width 32', '')
    """

    width: int = 0
    depth: int = 0

    @property
    def label(self) -> str:
        """What tables call it; empty for the workload's own size."""
        return ", ".join(f"{name} {value}" for name, value in (("width", self.width), ("depth", self.depth)) if value)

    def of(self, arm: Arm, workload: Workload) -> Arm:
        """Return an arm at this size, with the size in its label.

        The workload's own size is written as 0, so that its runs are those of a sweep without sizes.
        """
        asked = {
            name: 0 if value == getattr(workload, name) else value
            for name, value in (("width", self.width), ("depth", self.depth))
            if value
        }
        return Arm(f"{arm.label}, {self.label}", arm.settings.replace(**asked)) if asked else arm

    def to_json(self) -> dict[str, Any]:
        """Return plain data; None where the workload's own is left."""
        return {"width": self.width or None, "depth": self.depth or None}


def sizes(widths: Sequence[int], depths: Sequence[int], arms: Sequence[Arm]) -> tuple[Size, ...]:
    """Return every width with every depth, narrow and shallow first.

    Args:
        widths: widths, or none for the workload's own.
        depths: depths, or none for the workload's own.
        arms: what is to be swept; refused if they set what the sweep sets.

    Returns:
        The sizes; one, `Size()`, where neither widths nor depths are given.

    Raises:
        UsageError: if a size is not a positive whole number, is given twice, or is set by an arm too.
    """
    for name, values in (("width", widths), ("depth", depths)):
        if any(isinstance(value, bool) or not isinstance(value, int) or value < 1 for value in values):
            raise UsageError(f"a {name} is a whole number of at least 1, got {', '.join(map(str, values))}.")
        if len(set(values)) != len(values) or len(values) > _MOST:
            twice = next((value for value in values if values.count(value) > 1), None)
            found = f"{len(values)}" if twice is None else f"{twice} twice"
            raise UsageError(f"a sweep takes up to {_MOST} different {name}s, got {found}.")
        for arm in arms:
            if values and getattr(arm.settings, name):
                raise UsageError(f"the arm {arm.label!r} sets a {name}: the sweep does, so leave it out.")
    return tuple(
        Size(width, depth) for width, depth in itertools.product(sorted(widths) or (0,), sorted(depths) or (0,))
    )
