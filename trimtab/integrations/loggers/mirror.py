"""What every mirror of a record does: name each number, keep a step's numbers together, hand them on."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping

import numpy as np

_UNFIT = re.compile(r"[^A-Za-z0-9_.\-/ ]")


class Mirror(ABC):
    """A listener of a `Recorder` that passes each step's numbers to another logger.

    A subclass gives `put`, and `finish` if it has something to close. A signal without labels is named as it is, one
    with labels `SIGNAL/LABEL`; characters that a logger may refuse become underscores.

    Args:
        signals: names of the signals to mirror; all of them by default. Signals by head or module are many numbers a
            step: `signals=("loss", "lr", "grad_norm")` keeps a remote logger light.

    Example:
        >>> class Printer(Mirror):
        ...     def put(self, step, numbers):
        ...         print(step, dict(numbers))
        >>> mirror = Printer()
        >>> mirror(0, "loss", (), np.array([5.5]))
        >>> mirror(0, "attention_max_logit", ("block/head0", "block/head1"), np.array([1.0, 2.0]))
        >>> mirror.close()
        0 {'loss': 5.5, 'attention_max_logit/block/head0': 1.0, 'attention_max_logit/block/head1': 2.0}
    """

    def __init__(self, *, signals: Collection[str] | None = None) -> None:
        self._signals = None if signals is None else frozenset(signals)
        self._step = -1
        self._numbers: dict[str, float] = {}

    def __call__(self, step: int, name: str, labels: tuple[str, ...], values: np.ndarray) -> None:
        """Take one acknowledged entry of the record."""
        if self._signals is not None and name not in self._signals:
            return
        if step != self._step:
            self._hand_on()
            self._step = step
        for label, value in zip(labels or ("",), values.tolist(), strict=True):
            self._numbers[_tag(name, label, labelled=bool(labels))] = value

    def close(self) -> None:
        """Hand on the last step and finish."""
        self._hand_on()
        self.finish()

    def _hand_on(self) -> None:
        if self._numbers:
            numbers, self._numbers = self._numbers, {}
            self.put(self._step, numbers)

    @abstractmethod
    def put(self, step: int, numbers: Mapping[str, float]) -> None:
        """Log the numbers of one step. NaN and infinities come as they are."""

    def finish(self) -> None:  # noqa: B027  having nothing to close is a valid answer
        """Close what the mirror has opened."""


def _tag(name: str, label: str, *, labelled: bool) -> str:
    tag = f"{name}/{label or 'model'}" if labelled else name
    return _UNFIT.sub("_", tag)
