"""Forecast of instability: extrapolate what grows, over runs that were stable, to where runs break.

    log10 y = c0 + c1 u (+ c2 u^2) (+ d v) + e,    u = log10 x,  v = log10 of a second quantity
    x* = the first x beyond the runs at which y(x) reaches the threshold

x is a learning rate or a width, y the largest attention logit or the root mean square of a gradient. Wortsman et al.
2023 (arXiv:2309.14322; sections 3.4 and 3.5, recalled) fit a quadratic in the logarithm of the number of parameters at
each learning rate; they saw every run beyond a logit of 1e4 diverge, forecast from smaller models that one of 4.8
billion parameters would, and it did. They also follow gradients down to Adam's epsilon, where its update vanishes.

The interval is where the prediction band of the fit crosses the threshold: with p coefficients, n points, s^2 the
residual variance and z the row of x, the band is y(x) ± t(n - p) s sqrt(1 + z' (Z'Z)^-1 z). The 1 is the scatter of
a run of its own: the interval is for the next run.

Why 1e3 is the default threshold. Wortsman et al. transplant logits into a small model and see its loss suffer from
about 1e3, and worse than a bigram's by 1e4 (recalled); Kimi K2 (arXiv:2507.20534) reports logits beyond 1e3 in the run
that made it clip them. `lm-small` (1,000 steps, one seed) has lost a tenth of its progress from a learning rate of 0.08
on, where its logits pass 1e3, and does not diverge outright even at 4.5e4: 1e4 is the paper's level for large models.

What it cannot see is a bend beyond the runs. In that sweep logits grow as lr^0.6 up to the last stable rate, 0.03, and
as lr^2.2 after it, so that the line puts the crossing a decade too high; its interval has no upper end, and says so.
In short, noisy runs (benchmarks/forecast.py: 300 steps of batch 8, one seed) the rate at which the loss breaks was
forecast 0.2 decades too high at width 64, 0.3 at width 128 from widths 32 and 64, and 1.0 at width 32, whose losses
break before its logits grow: whatever else breaks a run, a fit of logits does not see.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from trimtab.card import Card, Default, Paper
from trimtab.errors import UsageError

__all__ = ["InstabilityForecast", "forecast_instability"]

THRESHOLD = 1e3
_STEPS = 200
"""Points to a decade at which the band is searched for its crossing, which is then bisected."""


@dataclass(frozen=True)
class InstabilityForecast:
    """Where a growing quantity is expected to cross its threshold, and what says so.

    Attributes:
        over: what x is: "lr", "width", "parameters" or "step".
        signal: what y is.
        threshold: the value of y at which runs break.
        x: the fit's points, ascending.
        y: their values.
        residuals: log10 of value over fit at each point, in decades.
        spread: residual standard deviation in decades; NaN without freedom.
        coefficients: c0, c1 (, c2) (, d).
        beside: the second quantity at each point, or empty.
        at: the second quantity's value that the forecast is for, or None.
        prediction: x at the crossing, or None if it cannot be told.
        low: lower end of the interval; the last point's x if the band is above the threshold there already.
        high: upper end, or None if the interval has none within reach.
        level: confidence level of the interval.
        reason: why there is no prediction, or what limits it; empty otherwise.
    """

    over: str
    signal: str
    threshold: float
    x: tuple[float, ...]
    y: tuple[float, ...]
    residuals: tuple[float, ...] = ()
    spread: float = math.nan
    coefficients: tuple[float, ...] = ()
    beside: tuple[float, ...] = ()
    at: float | None = None
    prediction: float | None = None
    low: float | None = None
    high: float | None = None
    level: float = 0.95
    reason: str = ""

    def value(self, x: float) -> float:
        """Return the fit's y at an x (and at `at`); NaN without a fit."""
        if not self.coefficients:
            return math.nan
        return float(10.0 ** (_rows(np.log10(x), self._degree, self.at) @ np.array(self.coefficients)))

    def error(self, measured: float) -> float | None:
        """Return log10(prediction / measured), in decades; None without a prediction."""
        return None if self.prediction is None else math.log10(self.prediction / measured)

    @property
    def _degree(self) -> int:
        return len(self.coefficients) - 1 - (self.at is not None)

    def to_json(self) -> dict[str, Any]:
        """Return plain data; a number that is not finite is None."""
        data = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}
        return {**data, "spread": self.spread if math.isfinite(self.spread) else None}

    def __str__(self) -> str:
        if self.prediction is None:
            return f"cannot tell: {self.reason}"
        end = "unbounded" if self.high is None else f"{self.high:.3g}"
        limits = f" ({self.reason})" if self.reason else ""
        return (
            f"{self.signal} crosses {self.threshold:g} at {self.over} {self.prediction:.3g} "
            f"[{self.low:.3g}, {end}], {self.level:.0%} interval{limits}"
        )


def forecast_instability(
    x: Sequence[float],
    y: Sequence[float],
    *,
    threshold: float = THRESHOLD,
    over: str = "lr",
    signal: str = "attention_max_logit",
    falling: bool = False,
    degree: int = 1,
    beside: Sequence[float] = (),
    at: float | None = None,
    reach: float = 2.0,
    level: float = 0.95,
) -> InstabilityForecast:
    """Fit the growth of y with x on log scales and return where it crosses the threshold.

    log10 y = c0 + c1 log10 x (+ c2 log10^2 x) (+ d log10 beside). For Adam's epsilon give the root mean square of the
    gradients as y, epsilon as the threshold and `falling=True`.

    Args:
        x: learning rates, widths, parameters or steps of stable runs, above 0; runs of several seeds repeat them.
        y: what grows, above 0.
        threshold: the y at which runs break, above 0.
        over: what x is, for the result.
        signal: what y is, for the result.
        falling: whether y falls to the threshold instead of rising.
        degree: 1, or 2 for the paper's quadratic.
        beside: a second quantity that changes between the points (the width, beside learning rates), above 0.
        at: the second quantity's value to forecast for; required with `beside`, and only then.
        reach: decades beyond the largest x in which a crossing is looked for, above 0.
        level: confidence level of the interval, in (0, 1).

    Returns:
        The forecast; without a prediction, and with the reason, if the points are fewer than the coefficients and one,
        if they do not grow, or if they do not reach the threshold within `reach`.

    Raises:
        UsageError: if points do not match, are not positive, or an option is out of its range.

    Example:
        >>> found = forecast_instability([0.001, 0.002, 0.004, 0.008], [2.1, 7.7, 33.0, 127.0])
        >>> f"{found.prediction:.4f}", found.low < 0.0223 < found.high
        ('0.0226', True)
        >>> print(forecast_instability([0.001, 0.002], [1.0, 4.0]))
        cannot tell: a line needs at least 3 points, got 2

    References:
        Wortsman et al. 2023, Small-scale proxies for large-scale Transformer training instabilities, arXiv:2309.14322.
    """
    _check(x, y, beside, at, threshold, degree, reach, level)
    order = np.argsort(np.asarray(x, dtype=np.float64), kind="stable")
    xs, ys = np.asarray(x, dtype=np.float64)[order], np.asarray(y, dtype=np.float64)[order]
    others = np.asarray(beside, dtype=np.float64)[order] if len(beside) else None
    common: dict[str, Any] = {
        "over": over,
        "signal": signal,
        "threshold": threshold,
        "x": tuple(xs.tolist()),
        "y": tuple(ys.tolist()),
        "beside": () if others is None else tuple(others.tolist()),
        "at": at,
        "level": level,
    }
    needed = degree + 2 + (others is not None)
    if len(xs) < needed:
        shape = "a line" if degree == 1 else "a parabola"
        also = " over two quantities" if others is not None else ""
        return InstabilityForecast(**common, reason=f"{shape}{also} needs at least {needed} points, got {len(xs)}")
    if len(set(xs)) <= degree or (others is not None and len(set(others)) < 2):
        return InstabilityForecast(**common, reason="the points lie at too few different places for the fit")
    rows = _rows(np.log10(xs), degree, others)
    if np.linalg.matrix_rank(rows) < rows.shape[1]:
        return InstabilityForecast(**common, reason="the two quantities change together: their effects cannot be told")
    sign = -1.0 if falling else 1.0
    band = _Band(rows, sign * np.log10(ys), level)
    common |= {
        "residuals": tuple((sign * band.residuals).tolist()),
        "spread": band.spread,
        "coefficients": tuple((sign * band.coefficients).tolist()),
    }
    return InstabilityForecast(**common, **_crossings(band, xs, sign * math.log10(threshold), degree, at, reach))


def _rows(u: np.ndarray, degree: int, others: np.ndarray | float | None) -> np.ndarray:
    """Return the fit's row at each u = log10 x: [N, coefficients]."""
    columns = [u**power for power in range(degree + 1)]
    if others is not None:
        columns.append(np.broadcast_to(np.log10(others), u.shape))
    return np.stack(columns, axis=-1)


class _Band:
    """Least squares with its prediction band."""

    def __init__(self, rows: np.ndarray, values: np.ndarray, level: float) -> None:
        from scipy.stats import t  # half a second to import

        self.coefficients, *_ = np.linalg.lstsq(rows, values, rcond=None)
        self.residuals = values - rows @ self.coefficients
        freedom = len(values) - rows.shape[1]
        self.spread = float(np.sqrt(self.residuals @ self.residuals / freedom))
        self._inverse = np.linalg.pinv(rows.T @ rows)
        self._width = float(t.ppf((1 + level) / 2, freedom)) * self.spread

    def edge(self, rows: np.ndarray, side: int) -> np.ndarray:
        """Return the fit (0), or the band's lower (-1) or upper (+1) edge, at each row."""
        scatter = np.sqrt(1 + np.sum((rows @ self._inverse) * rows, axis=-1))
        return np.asarray(rows @ self.coefficients + side * self._width * scatter)


def _crossings(
    band: _Band, xs: np.ndarray, level: float, degree: int, at: float | None, reach: float
) -> dict[str, Any]:
    """Return where the fit and the edges of its band cross the level beyond the points."""
    # With a second quantity, the runs at the value asked for may already be beyond the crossing: search from below.
    start = math.log10(xs[0] if at is not None else xs[-1])
    stop = math.log10(xs[-1]) + reach

    def edge(u: np.ndarray | float, side: int) -> np.ndarray:
        return band.edge(_rows(np.asarray(u, dtype=np.float64), degree, at), side)

    def crossing(side: int) -> float | None:
        grid = np.linspace(start, stop, max(2, round(_STEPS * (stop - start))))
        above = np.flatnonzero(edge(grid, side) >= level)
        if not len(above):
            return None
        first = int(above[0])
        if first == 0:
            return float(10.0**start)
        low, high = float(grid[first - 1]), float(grid[first])
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (low, middle) if edge(middle, side) >= level else (middle, high)
        return float(10.0**high)

    prediction, low, high = crossing(0), crossing(1), crossing(-1)
    if prediction is None:
        last = math.log10(xs[-1])
        grows = bool(edge(last + 0.1, 0) > edge(last, 0))
        reason = f"no crossing within {reach:g} decades beyond the points" if grows else "no growth at the last points"
        return {"reason": reason}
    reason = ""
    if prediction <= 10.0**start * (1 + 1e-9):
        reason = "the fit is beyond the threshold from the start of the points: it crosses there or earlier"
    elif high is None:
        reason = "the scatter allows a crossing much later, or none"
    return {"prediction": prediction, "low": low, "high": high, "reason": reason}


def _check(
    x: Sequence[float],
    y: Sequence[float],
    beside: Sequence[float],
    at: float | None,
    threshold: float,
    degree: int,
    reach: float,
    level: float,
) -> None:
    if len(x) != len(y) or (len(beside) and len(beside) != len(x)):
        raise UsageError(f"a forecast needs one value for each point: got {len(x)}, {len(y)} and {len(beside)}.")
    if bool(len(beside)) != (at is not None):
        raise UsageError("beside and at go together: give the second quantity at each point, and where to forecast.")
    numbers = {"x": x, "y": y, "beside": beside, "at": [] if at is None else [at], "threshold": [threshold]}
    for name, values in {**numbers, "reach": [reach]}.items():
        wrong = [value for value in values if not (math.isfinite(value) and value > 0)]
        if wrong:
            raise UsageError(f"{name} of a forecast must be finite and above 0, got {wrong[0]}.")
    if degree not in (1, 2):
        raise UsageError(f"degree of a forecast is 1 or 2, got {degree}.")
    if not 0 < level < 1:
        raise UsageError(f"a confidence level is between 0 and 1, got {level}.")


CARD = Card(
    name="instability-forecast",
    room="tune",
    summary="the learning rate or width at which attention logits will outgrow training, from runs that were stable",
    paper=Paper(
        "Small-scale proxies for large-scale Transformer training instabilities",
        2023,
        arxiv="2309.14322",
    ),
    equation="log10 y = c0 + c1 log10 x (+ c2 log10^2 x) (+ d log10 w);  x* = min { x : y(x) >= threshold }",
    claim="Instabilities can be predicted before they emerge, by the scaling of activation and gradient norms.",
    acts_on="run",
    entry="trimtab.tune.scaling.forecast:forecast_instability",
    defaults=(
        Default(
            "threshold", 1e3, "ours, see the module's text; the paper's large models diverge beyond 1e4 (recalled)"
        ),
        Default("over", "lr", "ours"),
        Default("signal", "attention_max_logit", "paper, section 3.4 (recalled)"),
        Default("falling", False, "paper: logits rise, gradients fall (recalled)"),
        Default(
            "degree", 1, "ours: a line over learning rates; the paper's quadratic is over log parameters (recalled)"
        ),
        Default("beside", (), "ours"),
        Default("at", None, "ours"),
        Default("reach", 2.0, "ours"),
        Default("level", 0.95, "ours"),
    ),
    verified={
        "equation": (
            "tests/tune/scaling/test_forecast.py::test_the_fit_is_scipys",
            "tests/tune/scaling/test_forecast.py::test_a_known_law_is_crossed_where_it_says",
            "tests/tune/scaling/test_forecast.py::test_the_interval_covers_the_next_run",
        ),
    },
    deviations=(
        "The paper gives a fit and no interval; the prediction band and its crossing are ours.",
        "The paper fits over parameters at a fixed learning rate; here also over the learning rate, and over both.",
    ),
)
