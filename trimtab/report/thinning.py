"""Thin a long curve without losing its spikes, and keep what is not a finite number apart from what is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

_MARKS = 200


@dataclass(frozen=True)
class Line:
    """A curve ready to be drawn.

    Attributes:
        x: steps, ascending.
        y: finite values, or None where the curve has a gap.
        marks: `(step, kind)` of values that are not finite, kind being `"nan"`, `"+inf"` or `"-inf"`: the first ones.
        broken: how many values are not finite in all.
    """

    x: list[int]
    y: list[float | None]
    marks: list[tuple[int, str]]
    broken: int = 0

    def to_json(self) -> dict[str, Any]:
        """Return the curve as plain data."""
        return {"x": self.x, "y": self.y, "marks": [list(mark) for mark in self.marks]}


def thinned(
    steps: Sequence[int] | np.ndarray, values: Sequence[float] | np.ndarray, *, points: int = 1200, log: bool = False
) -> Line:
    """Reduce a curve to about `points` points by keeping the smallest and the largest value of each stretch of it.

    A spike of one step survives any thinning, as do the first and the last finite value; a stretch that holds a value
    that is not finite keeps a gap at its place. On a log axis (`log`) a value that is not positive has no place either
    and leaves a gap.

    Args:
        steps: ascending step numbers.
        values: one value a step.
        points: about how many points to keep, at least 4.
        log: the curve will be drawn on a logarithmic axis.

    Returns:
        The curve, with its gaps and marks.

    Example:
        >>> line = thinned(range(10_000), [0.0] * 5_000 + [9.0] + [0.0] * 4_999, points=100)
        >>> len(line.x) < 110, max(line.y), line.x[line.y.index(9.0)]
        (True, 9.0, 5000)
    """
    x = np.asarray(steps, dtype=np.int64)
    y = np.asarray(values, dtype=np.float64)
    finite = np.isfinite(y)
    drawn = finite & (y > 0) if log else finite
    keep = _kept(y, drawn, max(4, points))
    broken = np.flatnonzero(~finite)
    return Line(
        x=x[keep].tolist(),
        y=[value if good else None for value, good in zip(y[keep].tolist(), drawn[keep].tolist(), strict=True)],
        marks=[(int(x[index]), _kind(y[index])) for index in broken[:_MARKS]],
        broken=len(broken),
    )


def _kept(y: np.ndarray, drawn: np.ndarray, points: int) -> np.ndarray:
    """Return the sorted indices of the points to keep."""
    count = len(y)
    if count <= points:
        return np.arange(count)
    edges = np.linspace(0, count, points // 2 + 1).astype(np.int64)
    keep: list[int] = []
    for start, stop in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        good = np.flatnonzero(drawn[start:stop]) + start
        if len(good):
            part = y[good]
            keep += [int(good[part.argmin()]), int(good[part.argmax()])]
        if len(good) < stop - start:
            keep.append(start + int(np.argmin(drawn[start:stop])))
    ends = np.flatnonzero(drawn)
    if len(ends):
        keep += [int(ends[0]), int(ends[-1])]
    return np.unique(keep)


def _kind(value: float) -> str:
    if np.isnan(value):
        return "nan"
    return "+inf" if value > 0 else "-inf"
