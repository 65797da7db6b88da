"""The course of the loss: where it began, how far it came, where it ended. Several rules ask whether it suffered."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from trimtab.diagnose.pathology import Signals
from trimtab.diagnose.robust import finite_points, median, rolling_median, spread

_FIRST = 3
_SHORTEST = 20


@dataclass(frozen=True)
class Course:
    """The finite losses of a run and their robust summary.

    Attributes:
        steps: steps with a finite loss, int64 [N].
        losses: their losses, float64 [N].
        smooth: median over the last `window` losses, float64 [N].
        window: its length, one twentieth of the run between 5 and 101.
        initial: median of the first three losses, or the very first where the loss doubled at once.
        best: lowest value of `smooth` (once it covers a whole window).
        best_index: where that is.
        final: median of the last window.
        noise: spread of the losses about `smooth`.
    """

    steps: np.ndarray
    losses: np.ndarray
    smooth: np.ndarray
    window: int
    initial: float
    best: float
    best_index: int
    final: float
    noise: float

    @property
    def progress(self) -> float:
        """How far the loss came down from its initial value, at best."""
        return self.initial - self.best

    @property
    def lost(self) -> float:
        """Share of the progress that was lost again by the end; 0 where there was none beyond the noise."""
        return (self.final - self.best) / self.progress if self.progress > 5 * self.noise else 0.0


def loss_course(signals: Signals) -> Course | None:
    """Return the course of the loss, or None if fewer than twenty losses are finite."""
    steps, losses = finite_points(signals.series("loss"))
    if len(losses) < _SHORTEST:
        return None
    window = int(np.clip(len(losses) // 20, 5, 101))
    smooth = rolling_median(losses, window)
    best_index = window - 1 + int(np.argmin(smooth[window - 1 :]))
    return Course(
        steps=steps,
        losses=losses,
        smooth=smooth,
        window=window,
        initial=_initial(losses),
        best=float(smooth[best_index]),
        best_index=best_index,
        final=float(smooth[-1]),
        noise=spread(losses - smooth),
    )


def _initial(losses: np.ndarray) -> float:
    typical = median(losses[:_FIRST])
    return float(losses[0]) if 0 < losses[0] < typical / 2 else typical


def ends_broken(signals: Signals) -> bool:
    """Return whether the record ends in a loss that is not finite."""
    loss = signals.series("loss")
    return len(loss) > 0 and not np.isfinite(loss.flat[-1])
