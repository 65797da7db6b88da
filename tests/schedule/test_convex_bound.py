"""The convex bound: its equation by plain loops, its closed forms, that it holds, and the paper's picture."""

from __future__ import annotations

import math

import numpy as np
import pytest

from trimtab.errors import UsageError
from trimtab.schedule import (
    bound_curve,
    cosine,
    inverse_sqrt,
    linear,
    optimal_base_lr,
    suboptimality_bound,
    wsd,
)


def _by_loops(eta, gamma, G, D):
    """Theorem 1 as it stands, with T = len(eta)."""
    T = len(eta)
    steps = [gamma * value for value in eta]
    first = D**2 / (2 * sum(steps))
    second = sum(steps[t] ** 2 * G[t] ** 2 for t in range(T)) / (2 * sum(steps))
    third = 0.0
    for k in range(T - 1):
        inner = 0.0
        for t in range(k, T):
            inner += steps[t] ** 2 * G[t] ** 2
        after = 0.0
        for t in range(k + 1, T):
            after += steps[t]
        third += steps[k] / after * inner / (after + steps[k])
    return first + second + 0.5 * third


@pytest.mark.parametrize("schedule", [cosine(60, warmup=5), linear(60), wsd(60, warmup=4, decay=12), wsd(60, decay=0)])
def test_equals_plain_loops(schedule):
    random = np.random.default_rng(0)
    G = random.uniform(0.5, 2.0, size=60)
    eta = [schedule(step) for step in range(60)]
    assert suboptimality_bound(schedule, 0.3, G=G, D=2.5) == pytest.approx(_by_loops(eta, 0.3, G, 2.5), rel=1e-12)
    curve = bound_curve(schedule, 0.3, G=G, D=2.5)
    expected = [_by_loops(eta[:t], 0.3, G[:t], 2.5) for t in range(1, 61)]
    np.testing.assert_allclose(curve, expected, rtol=1e-12)
    assert suboptimality_bound(eta, 0.3, G=list(G), D=2.5, T=17) == pytest.approx(expected[16], rel=1e-12)


@pytest.mark.parametrize("T", [1, 2, 100, 1000])
def test_constant_schedule_in_closed_form(T):
    """D^2 / (2 gamma T) + gamma G^2 / 2 (1 + H_{T-1}): the logarithm that a cooldown takes away."""
    harmonic = sum(1 / k for k in range(1, T))
    bound = suboptimality_bound(wsd(T, decay=0), 0.5, G=3.0, D=2.0)
    assert bound == pytest.approx(2.0**2 / (2 * 0.5 * T) + 0.5 * 3.0**2 / 2 * (1 + harmonic), rel=1e-12)


@pytest.mark.parametrize("schedule", [cosine(50), linear(50), wsd(50, decay=10, form="linear")])
def test_optimal_rate_is_where_the_bound_is_least(schedule):
    tuned = optimal_base_lr(schedule, G=2.0, D=5.0)
    assert suboptimality_bound(schedule, tuned.gamma, G=2.0, D=5.0) == pytest.approx(tuned.bound, rel=1e-12)
    tried = [suboptimality_bound(schedule, tuned.gamma * factor, G=2.0, D=5.0) for factor in np.geomspace(0.1, 10, 401)]
    assert min(tried) == pytest.approx(tuned.bound, rel=1e-12)
    assert np.argmin(tried) == 200
    unit = optimal_base_lr(schedule)
    assert tuned.gamma == pytest.approx(unit.gamma * 5.0 / 2.0)
    assert tuned.bound == pytest.approx(unit.bound * 10.0)


def _papers_wsd_bound(T, T0, D, G):
    """Theorem 9: WSD of T + 1 steps with a linear cooldown from T0, at its best base rate."""

    def harmonic(n):
        return sum(1 / k for k in range(1, n + 1))

    inner = 2 / 3 + (T + 2 * T0) / (3 * (T + T0)) + harmonic(T + T0 - 2) - harmonic(T - T0 + 1)
    inner -= (T - T0) * (T0 - 1) / (3 * (T - T0 + 2) * (T + T0))
    inner += 1 / (T - T0) ** 2 + harmonic(T - T0 - 1) / (T - T0 + 1)
    return D * G * math.sqrt(4 * inner / (T + T0))


@pytest.mark.parametrize("T", [100, 400, 2000])
def test_below_the_papers_bound_for_wsd(T):
    tuned = optimal_base_lr(wsd(T, decay=T // 5, form="linear"), G=2.0, D=3.0)
    bound = _papers_wsd_bound(T, T - T // 5, 3.0, 2.0)
    assert 0.8 * bound < tuned.bound <= bound


@pytest.mark.parametrize("T", [50, 400])
def test_no_schedule_promises_more_than_is_possible(T):
    """No subgradient method is better than D G / sqrt(T + 1) on all functions; linear decay is within twice of it."""
    for schedule in (linear(T), cosine(T), wsd(T, decay=T // 5), wsd(T, decay=0)):
        assert optimal_base_lr(schedule).bound > 1 / math.sqrt(T + 1)
    assert optimal_base_lr(linear(T)).bound < 2.1 / math.sqrt(T + 1)


def _max_of_rows(size, random):
    rows = random.normal(size=(2 * size, size))
    solution = random.normal(size=size)

    def value_and_subgradient(x):
        off = rows @ (x - solution)
        worst = np.argmax(np.abs(off))
        return np.abs(off)[worst], np.sign(off[worst]) * rows[worst]

    return value_and_subgradient, np.zeros(size), solution


def _norm(size, random):
    def value_and_subgradient(x):
        return np.linalg.norm(x), x / max(np.linalg.norm(x), 1e-300)

    return value_and_subgradient, random.normal(size=size), np.zeros(size)


def _coordinates(size, random):
    """max_i x_i by the first of the largest: it has no minimum, and is compared with a point at distance 1."""

    def value_and_subgradient(x):
        place = np.argmax(x)
        return x[place] + 1 / math.sqrt(size), np.eye(size)[place]

    return value_and_subgradient, np.zeros(size), np.full(size, -1 / math.sqrt(size))


@pytest.mark.parametrize("problem", [_max_of_rows, _norm, _coordinates])
@pytest.mark.parametrize(
    "schedule", [linear(80), cosine(80), wsd(80, decay=16), wsd(80, decay=0), inverse_sqrt(warmup=5)]
)
def test_holds_on_convex_functions(problem, schedule):
    T, nearest = 80, 0.0
    function, first, solution = problem(T if problem is _coordinates else 6, np.random.default_rng(1))
    D = float(np.linalg.norm(first - solution))
    for gamma in (0.02, 0.1, 0.5, 2.0):
        x, values, norms = first, [], []
        for step in range(T):
            value, subgradient = function(x)
            values.append(value)
            norms.append(float(np.linalg.norm(subgradient)))
            x = x - gamma * schedule(step) * subgradient
        bounds = bound_curve(schedule, gamma, G=norms, D=D, T=T)
        assert (np.array(values) <= bounds + 1e-12).all()
        nearest = max(nearest, max(np.array(values) / bounds))
    assert nearest > 0.3, "so far below the bound that the test says nothing"


def test_cooldown_drops_and_ends_near_cosine():
    """Figure 1 of the paper, right: WSD stays above cosine until its cooldown, then falls to nearly the same end."""
    T = 400
    ours, theirs = wsd(T, decay=T // 5, form="linear"), cosine(T)
    curve = bound_curve(ours, optimal_base_lr(ours).gamma)
    other = bound_curve(theirs, optimal_base_lr(theirs).gamma)
    start = T - T // 5
    assert curve[start - 1] > 1.3 * other[start - 1]
    before, during = curve[start - 81] - curve[start - 1], curve[start - 1] - curve[-1]
    assert during > 2 * before, "no sudden drop"
    assert curve[-1] < 1.08 * other[-1]
    bounds = [optimal_base_lr(shape).bound for shape in (linear(T), theirs, ours, wsd(T, decay=0))]
    assert bounds == sorted(bounds)
    assert bounds[-1] > 1.2 * bounds[-2]


@pytest.mark.parametrize("seed", range(3))
def test_real_losses_of_the_papers_convex_problem(seed):
    """min_w max |X w - y| in two dimensions: the drop of the cooldown and the end near cosine are no mere bound."""
    random, T = np.random.default_rng(seed), 400
    rows, solution = random.uniform(-1, 1, size=(20, 2)), random.normal(size=2)
    solution *= 5 / np.linalg.norm(solution)

    def losses(schedule, gamma):
        w, found = np.zeros(2), []
        for step in range(T):
            off = rows @ (w - solution)
            worst = np.argmax(np.abs(off))
            found.append(abs(off[worst]))
            w = w - gamma * schedule(step) * np.sign(off[worst]) * rows[worst]
        return np.array(found)

    ours, constant = losses(wsd(T, decay=80, form="linear"), 0.02), losses(wsd(T, decay=0), 0.02)
    other = losses(cosine(T), 0.04)
    plateau = ours[280:320].mean()
    assert ours[-5:].mean() < 0.25 * plateau, "no sudden drop"
    assert ours[-5:].mean() < 0.4 * constant[-40:].mean(), "it would have come without the cooldown"
    assert abs(ours[-5:].mean() - other[-5:].mean()) < 0.1 * plateau


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: suboptimality_bound(linear(4), 0.0), "gamma must be a number above 0, got 0.0"),
        (lambda: suboptimality_bound(linear(4), 1.0, D=-1.0), "D must be a number above 0"),
        (lambda: suboptimality_bound(inverse_sqrt(), 1.0), "no end: give T"),
        (lambda: suboptimality_bound(linear(4), 1.0, T=5), "the last above 0"),
        (lambda: suboptimality_bound([1.0, 1.0], 1.0, T=3), "need 3 values"),
        (lambda: suboptimality_bound(linear(4), 1.0, G=[1.0] * 3), "need 4 values"),
        (lambda: suboptimality_bound(linear(4), 1.0, G=[1.0, -1.0, 1.0, 1.0]), "G must be finite"),
        (lambda: suboptimality_bound([1.0, -1.0, 1.0], 1.0), "not below 0"),
        (lambda: bound_curve([1.0, 0.0, 1.0], 1.0), "every factor must be above 0"),
        (lambda: optimal_base_lr([]), "T must be a whole number of steps, at least 1"),
    ],
)
def test_wrong_use_is_one_line(call, text):
    with pytest.raises(UsageError, match=text):
        call()
