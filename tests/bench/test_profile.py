"""Performance profiles against a count over a fine grid."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimtab.bench import profile

times = st.one_of(st.floats(0.1, 100), st.just(math.inf))
tables = st.integers(1, 5).flatmap(lambda tasks: st.lists(st.lists(times, min_size=tasks, max_size=tasks), min_size=1))


@given(tables)
def test_equals_brute_force(table: list[list[float]]) -> None:
    given_times = {
        f"c{row}": {f"t{column}": value for column, value in enumerate(own)} for row, own in enumerate(table)
    }
    found = profile.ratios(given_times)
    matrix = np.array(table)
    kept = matrix[:, np.isfinite(matrix.min(0))]
    grid = np.linspace(1, 4, 601)
    for row, label in enumerate(given_times):
        own = found[label]
        assert len(own) == kept.shape[1]
        if not own:
            assert math.isnan(profile.score(own))
            assert math.isnan(profile.share_within(own, 1.0))
            continue
        brute = [(kept[row] <= tau * kept.min(0)).mean() for tau in grid]
        assert profile.score(own) == pytest.approx(np.trapezoid(brute, grid) / 3, abs=5e-3)
        for tau in (1.0, 1.37, 3.99):
            # The comparison of a ratio and that of a product may differ by a rounding at the border.
            edge = np.isclose(kept[row], tau * kept.min(0), rtol=1e-9)
            share = (kept[row] <= tau * kept.min(0)).mean()
            assert abs(profile.share_within(own, tau) - share) <= edge.mean() + 1e-12


@given(st.lists(st.one_of(st.floats(1, 10), st.just(math.inf)), min_size=1, max_size=6))
def test_corners_are_the_curve(own: list[float]) -> None:
    corners = profile.steps_of(own)
    assert corners[0][0] == 1.0
    assert corners[-1][0] == 4.0
    by_task = {str(place): ratio for place, ratio in enumerate(own)}
    area = 0.0
    for (left, level), (right, _) in pairwise(corners):
        assert level == profile.share_within(by_task, left) == profile.share_within(by_task, (left + right) / 2)
        area += level * (right - left)
    assert area / 3 == pytest.approx(profile.score(by_task))


def test_a_contender_that_lacks_a_task_never_arrives_there() -> None:
    found = profile.ratios({"a": {"x": 1.0, "y": 2.0}, "b": {"x": 1.0}})
    assert found["b"]["y"] == math.inf
    assert profile.share_within(found["b"], 100.0) == 0.5
