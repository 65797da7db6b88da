"""The forecast against scipy's regression, textbook intervals and laws known in advance."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import optimize, stats

from trimtab.errors import UsageError
from trimtab.tune import forecast_instability

_RATES = [1e-3, 1.78e-3, 3.16e-3, 5.62e-3, 1e-2, 1.78e-2]
_NOISE = [0.05, -0.03, 0.02, -0.06, 0.04, -0.02]


def _law(x, slope=1.5, at=10.0, noise=0.0):
    """Return y = at * (x / 0.003)^slope, off by a number of decades."""
    return at * (np.asarray(x) / 3e-3) ** slope * 10 ** np.asarray(noise)


def test_the_fit_is_scipys():
    x, y = np.log10(_RATES), np.log10(_law(_RATES, noise=_NOISE))
    line = stats.linregress(x, y)
    n = len(x)
    residuals = y - line.intercept - line.slope * x
    s = math.sqrt(sum(residuals**2) / (n - 2))
    t = stats.t.ppf(0.975, n - 2)

    def edge(u, side):
        half = t * s * math.sqrt(1 + 1 / n + (u - x.mean()) ** 2 / sum((x - x.mean()) ** 2))
        return line.intercept + line.slope * u + side * half - 3.0

    found = forecast_instability(_RATES, _law(_RATES, noise=_NOISE))
    assert found.coefficients == pytest.approx((line.intercept, line.slope))
    assert found.residuals == pytest.approx(residuals)
    assert found.spread == pytest.approx(s)
    for side, value in ((0, found.prediction), (1, found.low), (-1, found.high)):
        assert math.log10(value) == pytest.approx(optimize.brentq(edge, x[-1], 2.0, args=(side,)), abs=1e-6)
    assert found.value(0.02) == pytest.approx(10 ** (line.intercept + line.slope * math.log10(0.02)))


def test_a_parabola_is_numpys():
    x = np.array([16, 24, 32, 48, 64, 96])
    y = 10 ** (0.3 + 0.5 * np.log10(x) ** 2 + np.array(_NOISE))
    found = forecast_instability(x.tolist(), y.tolist(), over="width", degree=2)
    curve = np.polyfit(np.log10(x), np.log10(y), 2)
    assert found.coefficients == pytest.approx(curve[::-1], rel=1e-6)
    roots = np.roots(curve - np.array([0, 0, 3.0]))
    assert math.log10(found.prediction) == pytest.approx(max(roots.real), abs=1e-6)


def test_a_known_law_is_crossed_where_it_says():
    expected = 3e-3 * 100 ** (1 / 1.5)
    found = forecast_instability(_RATES, _law(_RATES, noise=1e-9 * np.array(_NOISE)))
    assert found.prediction == pytest.approx(expected, rel=1e-6)
    assert found.low == pytest.approx(expected, rel=1e-6)
    assert found.high == pytest.approx(expected, rel=1e-6)
    assert found.error(expected / 10) == pytest.approx(1.0, abs=1e-6)


def test_two_quantities_give_the_law_at_a_width_not_seen():
    # y = 2 (lr / 1e-3)^1.2 (width / 32)^0.8: 1e3 at width 128 where (lr / 1e-3)^1.2 = 500 / 4^0.8.
    lrs = [lr for lr in _RATES for _ in (32, 64)]
    widths = [width for _ in _RATES for width in (32, 64)]
    y = [2 * (lr / 1e-3) ** 1.2 * (width / 32) ** 0.8 for lr, width in zip(lrs, widths, strict=True)]
    found = forecast_instability(lrs, y, beside=widths, at=128)
    assert found.prediction == pytest.approx(1e-3 * (500 / 4**0.8) ** (1 / 1.2), rel=1e-6)
    assert found.coefficients[1:] == pytest.approx((1.2, 0.8))
    assert found.value(found.prediction) == pytest.approx(1e3, rel=1e-6)
    # The other way round: the width at which the rate found is too high.
    back = forecast_instability(widths, y, over="width", beside=lrs, at=found.prediction)
    assert back.prediction == pytest.approx(128, rel=1e-6)


def test_a_falling_gradient_meets_epsilon():
    # rms = 1e-5 (width / 64)^-2 meets 1e-8 at width 64 sqrt(1000).
    widths = [32, 64, 128, 256]
    rms = [1e-5 * (width / 64) ** -2 for width in widths]
    options = {"over": "width", "signal": "gradient_rms", "threshold": 1e-8}
    found = forecast_instability(widths, rms, falling=True, **options)
    assert found.prediction == pytest.approx(64 * math.sqrt(1000), rel=1e-6)
    assert found.value(64) == pytest.approx(1e-5)
    rising = forecast_instability(widths, rms[::-1], falling=True, **options)
    assert (rising.prediction, rising.reason) == (None, "no growth at the last points")


def test_the_interval_covers_the_next_run():
    """A new run's own crossing, scatter and all, falls into a 90% interval as often as it should."""
    random = np.random.default_rng(0)
    inside = 0
    for _ in range(400):
        y = _law(_RATES, noise=0.1 * random.standard_normal(6))
        found = forecast_instability(_RATES, y, level=0.9, reach=4.0)
        # The next run's value at x is off by one more draw: where it crosses.
        crossing = 3e-3 * (100 / 10 ** (0.1 * random.standard_normal())) ** (1 / 1.5)
        inside += found.low <= crossing <= (found.high or math.inf)
    assert 0.86 < inside / 400 < 0.94


@given(st.floats(1e-3, 1e3), st.floats(1e-3, 1e3))
def test_units_do_not_matter(x_unit, y_unit):
    y = _law(_RATES, noise=_NOISE)
    plain = forecast_instability(_RATES, y)
    scaled = forecast_instability([lr * x_unit for lr in _RATES], y * y_unit, threshold=1e3 * y_unit)
    assert scaled.prediction == pytest.approx(plain.prediction * x_unit, rel=1e-6)
    assert scaled.high == pytest.approx(plain.high * x_unit, rel=1e-6)


@pytest.mark.parametrize(
    ("x", "y", "options", "reason"),
    [
        ([], [], {}, "a line needs at least 3 points, got 0"),
        (_RATES[:3], [1.0, 2.0, 3.0], {"degree": 2}, "a parabola needs at least 4 points, got 3"),
        (_RATES[:3], [1, 2, 3], {"beside": [1, 1, 2], "at": 4}, "a line over two quantities needs at least 4 points"),
        ([0.1] * 4, [1.0, 2.0, 3.0, 4.0], {}, "too few different places"),
        (_RATES, [5.0, 4.9, 5.1, 5.0, 4.8, 4.9], {}, "no growth"),
        (_RATES, _law(_RATES, slope=0.1).tolist(), {}, "no crossing within 2 decades"),
        (_RATES, _law(_RATES).tolist(), {"beside": (10 * np.array(_RATES)).tolist(), "at": 1.0}, "change together"),
    ],
)
def test_it_says_that_it_cannot_tell(x, y, options, reason):
    found = forecast_instability(x, y, **options)
    assert (found.prediction, found.low, found.high) == (None, None, None)
    assert reason in found.reason
    assert str(found) == f"cannot tell: {found.reason}"


def test_what_limits_a_forecast_is_said():
    noisy = forecast_instability(_RATES[:3], [10.0, 12.0, 30.0])
    assert noisy.high is None
    assert "much later, or none" in str(noisy)
    late = forecast_instability(_RATES, _law(_RATES, at=5e3))
    assert late.prediction == late.low == pytest.approx(_RATES[-1])
    assert "beyond the threshold" in late.reason


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"y": [1.0]}, "one value for each point"),
        ({"beside": [1.0], "at": 2.0}, "one value for each point"),
        ({"at": 2.0}, "go together"),
        ({"x": [0.0, *_RATES[1:]]}, "x of a forecast must be finite and above 0, got 0"),
        ({"y": [math.nan] * 6}, "y of a forecast must be finite"),
        ({"threshold": -1.0}, "threshold of a forecast"),
        ({"reach": 0.0}, "reach of a forecast"),
        ({"degree": 3}, "degree of a forecast is 1 or 2, got 3"),
        ({"level": 1.0}, "between 0 and 1"),
    ],
)
def test_wrong_use_is_refused(change, match):
    with pytest.raises(UsageError, match=match):
        forecast_instability(**{"x": _RATES, "y": _law(_RATES).tolist(), **change})
