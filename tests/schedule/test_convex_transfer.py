"""What follows from the convex bound: rates for other schedules, cooldown lengths, longer runs."""

from __future__ import annotations

import numpy as np
import pytest

from trimtab.errors import UsageError
from trimtab.schedule import (
    best_cooldown,
    cosine,
    extended_cooldown,
    linear,
    optimal_base_lr,
    second_stage_factor,
    suboptimality_bound,
    transferred_base_lr,
    wsd,
)


def _best_by_search(schedule, **options):
    """The rate of the least bound, among many."""
    grid = np.geomspace(1e-2, 1, 801)
    return float(grid[np.argmin([suboptimality_bound(schedule, float(gamma), **options) for gamma in grid])])


def test_transfer_is_the_ratio_of_brute_force_optima():
    short, long = wsd(60, decay=12, form="linear"), cosine(200)
    for options in ({}, {"G": 3.0, "D": 0.5}):
        source, target = _best_by_search(short, **options), _best_by_search(long, **options)
        assert transferred_base_lr(source, short, long) == pytest.approx(target, rel=1e-2)
    assert transferred_base_lr(0.1, long, long) == pytest.approx(0.1)


def test_rates_of_the_paper():
    """A longer run wants a smaller rate, as 1 / sqrt(T); a longer cooldown a larger one, up to twice."""
    rates = [optimal_base_lr(linear(T)).gamma for T in (100, 400, 1600)]
    assert rates[0] / rates[1] == pytest.approx(2.0, rel=0.03)
    assert rates[1] / rates[2] == pytest.approx(2.0, rel=0.03)
    by_length = [optimal_base_lr(wsd(400, decay=decay, form="linear")).gamma for decay in (40, 80, 160, 320, 400)]
    assert by_length == sorted(by_length)


def test_best_cooldown_is_the_least_of_all():
    found = best_cooldown(50, gamma=0.1, G=0.7, D=1.5)
    every = {
        decay: suboptimality_bound(wsd(50, decay=decay, form="linear"), 0.1, G=0.7, D=1.5) for decay in range(3, 51)
    }
    assert found.decay == min(every, key=every.__getitem__)
    assert found.bound == min(every.values())
    assert found.gamma == 0.1
    assert 3 < found.decay < 50
    assert best_cooldown(50).decay == 50, "tuned for each length, a cooldown from the start is best"
    assert best_cooldown(400, gamma=0.01).decay < best_cooldown(400, gamma=0.03).decay


def test_extended_cooldown_keeps_the_rate():
    short = wsd(400, decay=80, form="linear")
    own = optimal_base_lr(short).gamma
    last = 80
    for T in (600, 800, 1200):
        found = extended_cooldown(short, T)
        assert found.gamma == pytest.approx(own, rel=0.02)
        adapted = suboptimality_bound(wsd(T, decay=found.decay, form="linear"), own)
        naive = suboptimality_bound(wsd(T, decay=T // 5, form="linear"), own)
        assert adapted < naive, "the point of it: same rate, better end"
        assert found.decay > last
        last = found.decay


@pytest.mark.parametrize(("times", "rho"), [(2, 0.525), (4, 0.375)])
def test_second_stage_of_the_authors_grid(times, rho):
    """The authors' rule on their grid of fortieths, with the shape written out."""
    T0, T = 800, 800 * times
    own = optimal_base_lr(wsd(T0, decay=160, form="linear")).gamma
    cooled, start = T // 5, T0 - 160

    def shape(factor):
        plateau = [1.0] * start + [factor] * (T - cooled - start)
        return plateau + [factor * (1 - step / cooled) for step in range(cooled)]

    grid = np.linspace(0.2, 1, 33)
    theirs = grid[np.argmin([abs(optimal_base_lr(shape(factor)).gamma - own) for factor in grid])]
    assert theirs == pytest.approx(rho)
    assert second_stage_factor(wsd(T0, decay=160, form="linear"), T) == pytest.approx(rho, abs=0.0176)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: transferred_base_lr(-1.0, linear(4), linear(4)), "gamma must be a number above 0"),
        (lambda: extended_cooldown(linear(4), 8), "made by wsd can be extended, got Shape"),
        (lambda: extended_cooldown(wsd(40), 40), "T must be more than the schedule's 40 steps, got 40"),
        (lambda: second_stage_factor(wsd(40), 30), "more than the schedule's 40 steps, got 30"),
        (lambda: best_cooldown(1), "T must be a whole number of steps, at least 2"),
        (lambda: best_cooldown(50, gamma=0.0), "gamma must be a number above 0"),
    ],
)
def test_wrong_use_is_one_line(call, text):
    with pytest.raises(UsageError, match=text):
        call()
