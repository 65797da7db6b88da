"""Times to a level and speed-ups: known where curves are, and fair where there is nothing to find."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimtab.bench import task
from trimtab.bench.runs import Ended
from trimtab.bench.speed import median_curve, resampled, speed_up, time_to

LOSS, ACCURACY = task("digits-mlp"), task("grokking")
GRID = tuple(range(0, 101, 5))


def run(course: list[float], seed: int = 0, grid: tuple[int, ...] = GRID) -> Ended:
    return Ended(seed, course[-1], course[-1], course[0], False, grid, tuple(course), 1e-3, {})


def falling(rate: float, noise: float = 0.0, seeds: int = 1, seed: int = 0) -> list[Ended]:
    draw = np.random.default_rng(seed)
    shifts = draw.normal(0, noise, seeds) if noise else np.zeros(seeds)
    return [
        run([3.0, *(3 * math.exp(-rate * step / 100) + float(shift) for step in GRID[1:])], number)
        for number, shift in enumerate(shifts)
    ]


@given(st.lists(st.floats(0, 10), min_size=2, max_size=12), st.floats(0, 10), st.booleans())
def test_time_to_is_where_a_finely_drawn_curve_first_arrives(values: list[float], target: float, higher: bool) -> None:
    steps, curve = np.arange(len(values)) * 7.0, np.array(values)
    fine = np.linspace(0, steps[-1], 20_001)
    drawn = np.interp(fine, steps, curve)
    arrived = fine[drawn >= target] if higher else fine[drawn <= target]
    found = time_to(steps, curve, target, higher_is_better=higher)
    reaches = curve.max() >= target if higher else curve.min() <= target
    assert math.isfinite(found) == bool(reaches)
    if len(arrived):
        assert found == pytest.approx(arrived[0], abs=2 * fine[1])


def test_a_rate_half_as_large_again_is_that_much_faster() -> None:
    # 3 exp(-1.5 r t) reaches 3 exp(-r) at t = 2/3; straight lines between evaluations are a little off.
    assert speed_up(LOSS, falling(1.0), falling(1.5)) == pytest.approx(1.5, rel=0.01)
    assert speed_up(LOSS, falling(1.5), falling(1.0)) == pytest.approx(1 / 1.5, rel=0.01)


@given(st.floats(0.1, 5), st.floats(0.1, 5))
def test_swapping_the_arms_inverts_it(first: float, second: float) -> None:
    there, back = speed_up(LOSS, falling(first), falling(second)), speed_up(LOSS, falling(second), falling(first))
    assert there * back == pytest.approx(1.0)


def test_equal_arms_are_as_often_above_1_as_below() -> None:
    logs = [
        math.log(speed_up(LOSS, falling(1.0, 0.1, 10, 2 * seed), falling(1.0, 0.1, 10, 2 * seed + 1)))
        for seed in range(200)
    ]
    spread = statistics.stdev(logs) / math.sqrt(len(logs))
    assert abs(statistics.fmean(logs)) < 3 * spread
    assert 80 <= sum(value > 0 for value in logs) <= 120


def test_an_arm_that_never_learns_is_slow_not_dropped() -> None:
    stuck = [run([3.0] * len(GRID))]
    assert speed_up(LOSS, falling(1.0), stuck) == pytest.approx(0.05)  # the first evaluation of twenty
    assert speed_up(LOSS, stuck, falling(1.0)) == pytest.approx(20.0)


def test_where_both_solve_the_task_the_time_is_to_what_is_enough() -> None:
    slow = [run([min(1.0, step / 90) for step in GRID])]
    fast = [run([min(0.999, step / 45) for step in GRID])]
    # The final values alone would call the second one worse.
    assert speed_up(ACCURACY, slow, fast) == pytest.approx(2.0, rel=0.02)


def test_the_median_curve_ends_at_the_value_that_counts() -> None:
    lost = Ended(2, 3.0, 3.0, 3.0, True, GRID, (*(1.0 for _ in GRID[1:]), 1.0), 1e-3, {})
    steps, curve = median_curve([falling(1.0)[0], lost, lost])
    assert steps.tolist() == list(GRID)
    assert curve[-1] == 3.0


def test_resampling_is_deterministic_and_scatters_around_the_estimate() -> None:
    base, other = falling(1.0, 0.1, 20, 1), falling(1.3, 0.1, 10, 2)
    drawn = resampled(LOSS, base, other, np.random.default_rng(0), 200)
    assert drawn == resampled(LOSS, base, other, np.random.default_rng(0), 200)
    low, high = np.quantile(drawn, [0.025, 0.975])
    assert low < speed_up(LOSS, base, other) < high
    assert low < 1.3 < high
