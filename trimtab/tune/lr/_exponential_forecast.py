"""Forecast a loss some steps ahead from its first steps, by an exponential through the smoothed series.

    L(t) = a exp(b t) + c,  b < 0:   for each b the best a and c in closed form, and b by a search in one dimension

Before the fit, iterated splines of degree 2 take outliers out of the first half of the series: where it strays furthest
from its own smoothing. Jin et al. 2021 (arXiv:2105.10762), section 4.2; authors' code autolrs_server.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.interpolate import UnivariateSpline
from scipy.optimize import minimize_scalar

from trimtab.errors import UsageError, choose

_DEGREE = 2
LEAST = _DEGREE + 3
"""Fewest losses that an exponential can be fitted to."""
_FASTEST = 3.0
_SLOWEST = 0.1
_GRID = 60
_JUMP = 0.1
"""Share of its first level by which a series may rise and still count as falling."""


@dataclass(frozen=True)
class Exponential:
    """The curve a exp(b t) + c, with t in places of the series."""

    a: float
    b: float
    c: float

    def __call__(self, t: float) -> float:
        return self.a * math.exp(self.b * t) + self.c


def exponential_forecast(
    losses: Sequence[float], horizon: float, *, rounds: int = 10, share: float = 0.03, fit: str = "kept"
) -> Exponential:
    """Fit an exponential to a series of losses; called with a place, it gives the loss there.

    Args:
        losses: at t = 0, 1, 2, ...; at least 5, all finite.
        horizon: the place that will be asked for. No decay slower than a tenth of an e-fold until there is fitted.
        rounds: of outlier removal; 0 for none.
        share: of the losses that each round may remove, at least one.
        fit: to the losses that were `"kept"`, or to their spline (`"smoothed"`, as the authors do).

    Returns:
        The curve.

    Raises:
        UsageError: if the series is too short or not finite.

    Example:
        >>> curve = exponential_forecast([2 * 0.9**t + 0.5 for t in range(30)], 300)
        >>> round(curve(300), 4)
        0.5
    """
    choose("fit", fit, ("kept", "smoothed"))
    y = np.asarray(losses, dtype=np.float64)
    if len(y) < LEAST or not np.isfinite(y).all():
        raise UsageError(f"a forecast needs at least {LEAST} finite losses, got {len(y)}: give longer trials.")
    x = np.arange(len(y), dtype=np.float64)
    kept_x, kept_y = x, y
    for _ in range(rounds):
        away = np.abs(kept_y - _smooth(kept_x, kept_y, kept_x))
        worst = np.argsort(away)[len(away) - max(1, round(len(away) * share)) :]
        # What is rounding, not noise, is no outlier: an exact series stays whole.
        worst = worst[(kept_x[worst] < (len(y) - 1) // 2) & (away[worst] > 1e-9 * np.abs(kept_y).max())]
        if len(kept_x) - len(worst) < LEAST:
            break
        kept_x, kept_y = np.delete(kept_x, worst), np.delete(kept_y, worst)
    if fit == "kept":
        return _fit(kept_x, kept_y, horizon)
    return _fit(x, _smooth(kept_x, kept_y, x), horizon)


def jumped(losses: Sequence[float]) -> float | None:
    """Return the level at which a series ends that rose on its way, and None for one that fell.

    A loss that leaps up and comes down again is no exponential decay: extrapolated, it would promise the impossible.
    Levels are means of a tenth of the series, at least 5 losses.

    Args:
        losses: all finite.
    """
    width = max(LEAST, len(losses) // 10)
    levels = np.convolve(np.asarray(losses, dtype=np.float64), np.full(width, 1 / width), "valid")
    return float(levels[-1]) if levels.max() > levels[0] + _JUMP * abs(levels[0]) else None


def _smooth(x: np.ndarray, y: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Return a quadratic smoothing spline of (x, y) at other places."""
    return UnivariateSpline(x, y, k=_DEGREE)(at)


def _fit(x: np.ndarray, y: np.ndarray, horizon: float) -> Exponential:
    slowest, fastest = math.log(_SLOWEST / max(horizon, len(x))), math.log(_FASTEST)

    def solve(log_rate: float) -> tuple[float, float, float]:
        """Return slope and level of y over expm1(b x) / b, which stays well-conditioned as b -> 0, and the error."""
        b = -math.exp(log_rate)
        basis = np.expm1(b * x) / b
        slope, level = np.linalg.lstsq(np.stack([basis, np.ones_like(x)], axis=1), y, rcond=None)[0]
        return float(slope), float(level), float(np.square(slope * basis + level - y).sum())

    rates = np.linspace(slowest, fastest, _GRID)
    best = int(np.argmin([solve(rate)[2] for rate in rates]))
    around = (rates[max(0, best - 1)], rates[min(_GRID - 1, best + 1)])
    found = minimize_scalar(lambda rate: solve(rate)[2], bounds=around, method="bounded", options={"xatol": 1e-10})
    rate = min((found.x, rates[best]), key=lambda value: solve(value)[2])
    slope, level, _ = solve(rate)
    b = -math.exp(rate)
    return Exponential(a=slope / b, b=b, c=level - slope / b)
