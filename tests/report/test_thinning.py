from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from trimtab.report.thinning import thinned

curves = arrays(
    np.float64, st.integers(1, 3000), elements=st.floats(-1e9, 1e9) | st.sampled_from([math.nan, math.inf, -math.inf])
)


@given(curves, st.integers(4, 200))
def test_no_spike_is_lost_and_nothing_is_made_up(values: np.ndarray, points: int) -> None:
    steps = 3 * np.arange(len(values)) + 1
    line = thinned(steps, values, points=points)
    truth = dict(zip(steps.tolist(), values.tolist(), strict=True))
    drawn = {step: value for step, value in zip(line.x, line.y, strict=True) if value is not None}
    finite = {step: value for step, value in truth.items() if math.isfinite(value)}
    assert drawn.items() <= finite.items()
    assert line.x == sorted(set(line.x))
    assert line.broken == len(truth) - len(finite)
    if finite:
        assert max(drawn.values()) == max(finite.values())
        assert min(drawn.values()) == min(finite.values())
        assert {min(finite), max(finite)} <= set(drawn)


@given(curves, st.integers(4, 200))
def test_a_long_curve_gets_short(values: np.ndarray, points: int) -> None:
    line = thinned(np.arange(len(values)), values, points=points)
    # Two points and a gap for each of points / 2 stretches, and the two ends.
    assert len(line.x) <= max(points, 3 * (points // 2)) + 2


def test_every_local_spike_survives() -> None:
    values = np.zeros(100_000)
    spikes = np.arange(500, 100_000, 1000)
    values[spikes] = 1 + np.arange(len(spikes))
    line = thinned(np.arange(len(values)), values, points=400)
    drawn = dict(zip(line.x, line.y, strict=True))
    assert all(drawn.get(int(step)) == values[step] for step in spikes)


def test_a_single_nan_keeps_its_gap() -> None:
    values = np.ones(50_000)
    values[31_234] = math.nan
    line = thinned(np.arange(len(values)), values, points=300)
    gap = line.y.index(None)
    assert line.marks == [(31_234, "nan")]
    assert line.x[gap] == 31_234


def test_kinds_of_what_is_not_finite() -> None:
    line = thinned([0, 1, 2, 3], [1.0, math.inf, -math.inf, math.nan])
    assert line.y == [1.0, None, None, None]
    assert line.marks == [(1, "+inf"), (2, "-inf"), (3, "nan")]


def test_a_log_axis_leaves_out_what_is_not_positive_without_calling_it_broken() -> None:
    line = thinned([0, 1, 2], [1.0, 0.0, 10.0], log=True)
    assert line.y == [1.0, None, 10.0]
    assert line.marks == []


@pytest.mark.parametrize("values", [[], [math.nan] * 2000])
def test_a_curve_without_a_number(values: list[float]) -> None:
    assert all(value is None for value in thinned(range(len(values)), values, points=50).y)
