from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from trimtab.diagnose.robust import (
    episodes,
    finite_largest,
    finite_points,
    growth,
    median,
    rolling_median,
    spread,
    trailing,
)
from trimtab.record import Series

numbers = npst.arrays(np.float64, st.integers(1, 60), elements=st.floats(-1e6, 1e6))


def test_median_and_spread_agree_with_scipy_over_the_finite_values() -> None:
    values = np.random.default_rng(0).standard_normal(501)
    dirty = np.concatenate([values, [np.nan, np.inf, -np.inf]])
    assert median(dirty) == np.median(values)
    assert spread(dirty) == pytest.approx(scipy.stats.median_abs_deviation(values, scale="normal"), rel=1e-4)
    assert math.isnan(median(np.array([np.nan])))
    assert spread(np.empty(0), default=1.0) == 1.0


@given(values=numbers, window=st.integers(1, 70))
def test_rolling_median_is_the_median_of_what_came_before(values: np.ndarray, window: int) -> None:
    expected = [np.median(values[max(0, index - window + 1) : index + 1]) for index in range(len(values))]
    np.testing.assert_array_equal(rolling_median(values, window), expected)


@given(values=numbers, window=st.integers(1, 20), gap=st.integers(0, 5))
def test_trailing_statistics_leave_out_the_value_and_the_gap(values: np.ndarray, window: int, gap: int) -> None:
    center, width = trailing(values, window, gap)
    for index in range(len(values)):
        before = values[max(0, index - window - gap) : max(0, index - gap)]
        if len(before) < window:
            assert np.isnan(center[index])
            assert np.isnan(width[index])
        else:
            assert center[index] == np.median(before)
            assert width[index] == pytest.approx(spread(before))


@given(values=numbers, hold=st.integers(1, 4))
def test_episodes_are_apart_begin_high_and_end_where_the_value_sank(values: np.ndarray, hold: int) -> None:
    found = episodes(values, enter=100.0, leave=10.0, hold=hold)
    for one, next_one in itertools.pairwise(found):
        assert one.ended
        assert one.last < next_one.first
    for one in found:
        assert (values[one.first : one.first + hold] >= 100).all()
        assert (values[one.first : one.last + 1] >= 10).all()
        if one.ended:
            assert values[one.last + 1] < 10
        else:
            assert one.last == len(values) - 1


def test_an_episode_survives_dips_above_the_milder_threshold() -> None:
    values = np.array([0, 9, 9, 4, 9, 4, 1, 0], float)
    (only,) = episodes(values, enter=8, leave=3, hold=2)
    assert (only.first, only.last, only.ended) == (1, 5, True)
    assert episodes(values, enter=8, leave=3, hold=3) == []
    assert episodes(values, enter=np.full(8, np.nan), leave=3, hold=1) == []


def test_growth_is_sens_slope_of_the_logarithm() -> None:
    rng = np.random.default_rng(1)
    steps = np.arange(0, 400, 10)
    values = np.exp(0.02 * steps + 0.3 * rng.standard_normal(len(steps)))
    expected = scipy.stats.theilslopes(np.log(values), steps, alpha=0.95)
    fit = growth(steps, values)
    assert fit is not None
    assert fit.rate == pytest.approx(expected.slope)
    assert fit.low == pytest.approx(expected.low_slope, rel=0.02)
    assert fit.high == pytest.approx(expected.high_slope, rel=0.02)
    assert fit.low < 0.02 < fit.high


def test_growth_ignores_outliers_and_what_has_no_logarithm() -> None:
    steps = np.arange(100)
    values = np.exp(0.1 * steps)
    values[::7] = [np.nan, np.inf, -1.0, 0.0, 1e9] * 3
    assert growth(steps, values).rate == pytest.approx(0.1)
    assert growth(steps[:4], values[:4]) is None
    assert growth(steps, np.ones(100)).steps_to(10, 1) == (math.inf, math.inf, math.inf)
    expected, earliest, latest = growth(steps, np.exp(0.1 * steps)).steps_to(math.e, 1.0)
    assert (expected, earliest, latest) == pytest.approx((10, 10, 10))


def test_finite_points_and_largest_drop_what_is_not_finite() -> None:
    values = np.array([[1, 5], [np.nan, 2], [np.nan, np.inf], [7, -np.inf]], float)
    series = Series("x", np.array([0, 10, 20, 30]), values, ("a", "b"))
    steps, first = finite_points(series, 0)
    assert (steps.tolist(), first.tolist()) == ([0, 30], [1, 7])
    steps, largest = finite_largest(series)
    assert (steps.tolist(), largest.tolist()) == ([0, 10, 30], [5, 2, 7])
    assert finite_largest(Series("x", np.empty(0, np.int64), np.empty((0, 1))))[1].shape == (0,)
