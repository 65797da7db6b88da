"""Learning-rate sensitivity: how much loss a wrong learning rate costs.

Wortsman et al., *Small-scale proxies for large-scale Transformer training instabilities* (2023, arXiv:2309.14322),
section 2.2, define it for learning rates η in [a, b] as

    S = E_η[min(l(η), l0) - l*],    l* = min_η l(η)

with l(η) the final loss of a run at η and l0 the loss at initialisation. They take both the expectation and the
minimum over seven learning rates, {3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1}, half a decade apart; the expectation is
thus over a log-uniform grid, and S depends on the range: a figure means something only beside it.
`log_grid("3e-4:3e-1", 7)` is that grid to within their rounding.

S+ is ours: the same mean over η >= η*, with η* the best of the grid. S counts learning rates that are merely too low
for the budget as well; S+ is what instability costs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trimtab.errors import UsageError


@dataclass(frozen=True)
class Sensitivity:
    """S and S+ of one loss curve.

    Attributes:
        s: mean over the grid of min(l, l0) - l*.
        s_plus: the same over the learning rates at or above the best one.
        best_lr: η*, the lowest learning rate that reaches l*.
        best_loss: l*.
    """

    s: float
    s_plus: float
    best_lr: float
    best_loss: float

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return {"S": self.s, "S_plus": self.s_plus, "best_lr": self.best_lr, "best_loss": self.best_loss}


def sensitivity(lrs: Sequence[float], losses: Sequence[float], initial_loss: float) -> Sensitivity:
    """Compute S = mean_η[min(l(η), l0) - l*] and S+ = the same over η >= η*.

    Args:
        lrs: learning rates, in any order, without repeats; log-spaced for S to be an expectation over log η.
        losses: the final loss at each; one that is not finite counts as l0.
        initial_loss: l0, the loss at initialisation.

    Returns:
        S, S+, and the best point of the curve.

    Raises:
        UsageError: if the curve is empty, the lengths differ, a learning rate repeats, or l0 is not finite.

    Example:
        >>> sensitivity([0.001, 0.01, 0.1], [2.0, 1.0, float("nan")], 5.0)
        Sensitivity(s=1.66..., s_plus=2.0, best_lr=0.01, best_loss=1.0)
    """
    if not lrs or len(lrs) != len(losses):
        raise UsageError(f"a curve needs one loss for each learning rate: got {len(lrs)} and {len(losses)}.")
    if len(set(lrs)) != len(lrs):
        raise UsageError(f"a curve needs each learning rate once, got {', '.join(f'{lr:g}' for lr in lrs)}.")
    if not math.isfinite(initial_loss):
        raise UsageError(f"the loss at initialisation must be finite, got {initial_loss}.")
    curve = sorted(
        (lr, min(loss, initial_loss) if math.isfinite(loss) else initial_loss)
        for lr, loss in zip(lrs, losses, strict=True)
    )
    best_lr, best = min(curve, key=lambda point: (point[1], point[0]))
    excess = [(lr, loss - best) for lr, loss in curve]
    above = [cost for lr, cost in excess if lr >= best_lr]
    return Sensitivity(
        s=math.fsum(cost for _, cost in excess) / len(excess),
        s_plus=math.fsum(above) / len(above),
        best_lr=best_lr,
        best_loss=best,
    )


def log_grid(bounds: str, points: int) -> tuple[float, ...]:
    """Return `points` learning rates from `"LOW:HIGH"`, evenly spaced in log, rounded to three digits.

    Raises:
        UsageError: if the text is not two positive numbers in order, or there are not 2 to 100 points, all different.

    Example:
        >>> log_grid("3e-4:3e-1", 7)
        (0.0003, 0.000949, 0.003, 0.00949, 0.03, 0.0949, 0.3)
    """
    parts = bounds.split(":")
    try:
        low, high = (float(part) for part in parts)
    except ValueError:
        raise UsageError(f"a range of learning rates is LOW:HIGH, such as 3e-4:3e-1, got {bounds!r}.") from None
    if not (0 < low < high < math.inf):
        raise UsageError(f"a range of learning rates has 0 < LOW < HIGH, got {bounds!r}.")
    if not 2 <= points <= 100:
        raise UsageError(f"a sweep takes 2 to 100 points, got {points}.")
    start, stop = math.log(low), math.log(high)
    exact = (math.exp(start + (stop - start) * index / (points - 1)) for index in range(points))
    grid = tuple(float(f"{lr:.3g}") for lr in exact)
    if len(set(grid)) != points:
        raise UsageError(f"{points} points do not fit into {bounds!r} at three digits: widen the range or take fewer.")
    return grid
