"""The paired interval against scipy's own paired t-test, and what never counts as evidence."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from trimtab.compare import Paired, paired
from trimtab.errors import UsageError

_VALUES = st.floats(-100, 100, allow_nan=False).map(lambda value: round(value, 3))
_PAIRS = st.lists(st.tuples(_VALUES, _VALUES), min_size=2, max_size=30)


@given(_PAIRS, st.sampled_from([0.5, 0.9, 0.95, 0.99]))
def test_interval_equals_scipy_ttest_rel(pairs: list[tuple[float, float]], level: float) -> None:
    first, second = (np.array(column) for column in zip(*pairs, strict=True))
    found = paired(list(first), list(second), level=level)
    spread = np.ptp(second - first)
    if spread < 1e-6:  # scipy's test has no answer without spread
        assert found.low == pytest.approx(found.high, abs=1e-6)
        return
    expected = stats.ttest_rel(second, first).confidence_interval(level)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), rel=1e-6, abs=1e-9)
    assert found.mean == pytest.approx(np.mean(second) - np.mean(first), abs=1e-9)


@given(_PAIRS)
def test_verdict_agrees_with_the_p_value(pairs: list[tuple[float, float]]) -> None:
    first, second = (np.array(column) for column in zip(*pairs, strict=True))
    if np.ptp(second - first) < 1e-6:
        return
    result = stats.ttest_rel(second, first)
    if abs(result.pvalue - 0.05) < 1e-9:
        return
    expected = "no evidence" if result.pvalue > 0.05 else "better" if result.statistic < 0 else "worse"
    assert paired(list(first), list(second)).verdict == expected
    swapped = {"no evidence": "no evidence", "better": "worse", "worse": "better"}[expected]
    assert paired(list(second), list(first)).verdict == swapped
    assert paired(list(first), list(second), higher_is_better=True).verdict == swapped


def test_one_pair_gives_no_evidence_and_an_unbounded_interval() -> None:
    found = paired([5.0], [1.0])
    assert (found.n, found.mean, found.verdict) == (1, -4.0, "no evidence")
    assert (found.low, found.high) == (-math.inf, math.inf)
    assert "n=1" in str(found)
    assert "no evidence" in str(found)


def test_identical_runs_give_no_evidence() -> None:
    found = paired([1.1, 2.2, 3.3], [1.1, 2.2, 3.3])
    assert (found.mean, found.low, found.high, found.verdict) == (0, 0, 0, "no evidence")


def test_a_difference_within_rounding_is_no_evidence() -> None:
    assert paired([0.3] * 5, [0.1 + 0.2] * 5).verdict == "no evidence"


def test_equal_differences_that_are_not_zero_are_evidence() -> None:
    assert paired([1.0, 2.0, 3.0], [0.5, 1.5, 2.5]).verdict == "better"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e308])
def test_a_pair_that_is_not_finite_is_kept_and_ends_the_evidence(value: float) -> None:
    found = paired([2.0, 2.1, 2.2, -1e308], [1.0, 1.1, 1.2, value])
    assert found.n == 4
    assert found.verdict == "no evidence"
    assert (found.low, found.high) == (-math.inf, math.inf)


def test_json_is_strict_and_comes_back() -> None:
    for found in (paired([1.0], [math.nan]), paired([1.0, 2.0, 2.5], [0.5, 1.0, 1.25])):
        text = json.dumps(found.to_json(), allow_nan=False)
        again = Paired.from_json(json.loads(text))
        assert repr(again) == repr(found)


def test_wrong_input_is_refused_in_one_line() -> None:
    with pytest.raises(UsageError, match="same seeds in both arms"):
        paired([1.0, 2.0], [1.0])
    with pytest.raises(UsageError, match="at least one"):
        paired([], [])
    with pytest.raises(UsageError, match=r"between 0 and 1, got 1\.5"):
        paired([1.0], [1.0], level=1.5)
