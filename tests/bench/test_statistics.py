"""Corrections and intervals against their definitions, written out in the test."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from trimtab.bench.statistics import bootstrap, geometric_mean, holm, p_value
from trimtab.compare import paired
from trimtab.errors import UsageError


def rejected(values: list[float], level: float) -> set[int]:
    """Holm's procedure as he states it: from the smallest p on, stop at the first that is not significant."""
    found: set[int] = set()
    for place, index in enumerate(sorted(range(len(values)), key=values.__getitem__)):
        if values[index] > level / (len(values) - place):
            break
        found.add(index)
    return found


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), st.floats(0.001, 0.999))
def test_holm_rejects_what_the_step_down_procedure_rejects(values: list[float], level: float) -> None:
    corrected = holm(values)
    if not any(math.isclose(value, level, rel_tol=1e-9) for value in corrected):  # a tie is decided by rounding
        assert {index for index, value in enumerate(corrected) if value <= level} == rejected(values, level)


def test_holm_by_hand() -> None:
    assert holm([0.04, 0.01, 0.03, 0.005]) == pytest.approx([0.06, 0.03, 0.06, 0.02])
    assert holm([0.5]) == [0.5]
    assert holm([]) == []
    with pytest.raises(UsageError, match="between 0 and 1"):
        holm([0.5, math.nan])


def test_holm_keeps_the_chance_of_any_false_rejection_below_the_level() -> None:
    draw = np.random.default_rng(0)
    wrong = sum(min(holm(list(draw.random(7)))) <= 0.05 for _ in range(2000))
    plain = sum(draw.random(7).min() <= 0.05 for _ in range(2000))
    assert wrong / 2000 < 0.065
    assert plain / 2000 > 0.25


@given(st.integers(2, 20), st.integers(0, 1000))
def test_p_is_that_of_the_paired_t_test(n: int, seed: int) -> None:
    draw = np.random.default_rng(seed)
    first, second = draw.normal(0, 1, n), draw.normal(0.3, 1, n)
    assert p_value(paired(first, second)) == pytest.approx(stats.ttest_rel(second, first).pvalue, rel=1e-6)


def test_p_where_the_test_is_not_defined() -> None:
    assert p_value(paired([1.0], [2.0])) == 1.0
    assert p_value(paired([1.0, 2.0], [1.0, 2.0])) == 1.0
    assert p_value(paired([1.0, 2.0], [1.5, 2.5])) == 0.0
    assert p_value(paired([1.0, 2.0], [1.0, math.inf])) == 1.0


def test_bootstrap_is_the_interval_of_every_resample() -> None:
    """With few tasks and draws the whole distribution can be enumerated."""
    draws = [[1.0, 1.5], [2.0, 0.5]]
    means = [
        math.exp((math.log(draws[a][i]) + math.log(draws[b][j])) / 2)
        for a, b, i, j in itertools.product(range(2), repeat=4)
    ]
    low, high = np.quantile(means, [0.1, 0.9])
    found = bootstrap(draws, np.random.default_rng(0), resamples=40_000, level=0.8)
    assert found == pytest.approx((low, high), rel=0.02)


def test_bootstrap_follows_from_its_generator_alone() -> None:
    draws = [[1.0, 1.1, 1.3], [0.9, 1.2, 1.0]]
    first = bootstrap(draws, np.random.default_rng(3), resamples=100)
    assert first == bootstrap(draws, np.random.default_rng(3), resamples=100)
    assert first != bootstrap(draws, np.random.default_rng(4), resamples=100)


def test_of_nothing() -> None:
    assert math.isnan(geometric_mean([]))
    assert all(map(math.isnan, bootstrap([], np.random.default_rng(0))))
    assert geometric_mean([1.0, 4.0]) == pytest.approx(2.0)
