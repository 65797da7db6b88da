"""The mixing law against known parameters, a grid over the simplex, and the authors' way of fitting two domains."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy.optimize import minimize

from trimtab.errors import UsageError
from trimtab.tune.proxies.mixing_law import fit_mixing_law

C = np.array([1.2, 2.9, 2.1])
K = np.array([0.9, 0.6, 1.4])
T = np.array([[-2.0, 0.3, -0.4], [0.2, -1.5, -0.6], [-0.1, -0.3, -2.5]])


def _law(c, k, t, r):
    """The paper's equation in plain loops."""
    return [
        [c[i] + k[i] * math.exp(sum(t[i][j] * row[j] for j in range(len(row)))) for i in range(len(c))] for row in r
    ]


def _simplex(n, sources=3):
    return np.array([row for row in itertools.product(range(n + 1), repeat=sources) if sum(row) == n]) / n


def test_recovers_known_parameters():
    r = _simplex(5)
    law = fit_mixing_law(r, _law(C, K, T, r))
    np.testing.assert_allclose(law.c, C, rtol=1e-5)
    # t is known up to a constant of each domain, which goes into k.
    np.testing.assert_allclose(law.t, T - T.mean(axis=1, keepdims=True), atol=1e-4)
    np.testing.assert_allclose(law.k, K * np.exp(T.mean(axis=1)), rtol=1e-4)
    held_out = np.random.default_rng(0).dirichlet(np.ones(3), size=50)
    np.testing.assert_allclose(law.predict(held_out), _law(C, K, T, held_out), rtol=1e-6)
    assert abs(law.residuals).max() < 1e-6


def test_an_outlier_does_not_bend_it():
    r = _simplex(6)
    y = np.array(_law(C, K, T, r))
    y[4] += 1.0
    held_out = np.random.default_rng(1).dirichlet(np.ones(3), size=50)
    error = abs(fit_mixing_law(r, y).predict(held_out) - _law(C, K, T, held_out)).max()
    squares = abs(fit_mixing_law(r, y, delta=1e3).predict(held_out) - _law(C, K, T, held_out)).max()
    assert error < 0.01 < 5 * error < squares


@pytest.mark.parametrize("weights", [[1, 1, 1], [0.7, 0.2, 0.1], [0, 0, 1]])
@pytest.mark.parametrize("largest", [None, [0.3, 1.0, 0.5]])
def test_best_mixture_equals_the_grid(weights, largest):
    r = _simplex(5)
    best = fit_mixing_law(r, _law(C, K, T, r)).best_mixture(weights, largest=largest)
    grid = _simplex(100)
    if largest is not None:
        grid = grid[(grid <= np.array(largest) + 1e-9).all(axis=1)]
    whole = np.array(_law(C, K, T, grid)) @ np.array(weights) / sum(weights)
    nearest = grid[whole.argmin()]
    assert sum(best.mixture) == pytest.approx(1, abs=1e-12)
    assert min(best.mixture) >= 0
    assert best.loss <= whole.min() + 1e-6
    np.testing.assert_allclose(best.mixture, nearest, atol=0.02)
    if largest is not None:
        assert (np.array(best.mixture) <= np.array(largest) + 1e-9).all()
    exact = (np.array(_law(C, K, T, [best.mixture])) @ np.array(weights) / sum(weights))[0]
    assert best.loss == pytest.approx(exact, abs=1e-6)
    assert best.gap < 1e-4


def test_the_gap_bounds_what_is_lost():
    r = _simplex(5)
    law = fit_mixing_law(r, _law(C, K, T, r))
    best = law.best_mixture()
    vertices = [law.predict([row]).mean() for row in np.eye(3)]
    assert best.loss - best.gap <= min(vertices)


def test_equals_the_authors_fit_of_two_domains():
    """Their notebook: c of the best correlation of log(y - c) with r, then Huber for the exponential (delta 0.02)."""
    generator = np.random.default_rng(3)
    x = np.linspace(0.1, 0.9, 9)
    y = 1.4 + np.exp(-2.4 * x - 0.6) + 0.001 * generator.standard_normal(9)
    best_c, best = 0.0, 0.0
    for c in np.linspace(0, y.min(), 1000)[:-1]:
        correlation = abs(np.corrcoef(x, np.log(y - c))[0, 1])
        if correlation > best:
            best_c, best = c, correlation

    def huber(p):
        z = abs(np.exp(p[0] * x + p[1]) - (y - best_c))
        return np.where(z < 0.02, z**2 / 2, 0.02 * (z - 0.01)).sum()

    slope, offset = minimize(huber, [-2.0, -0.5], method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-15}).x
    held_out = np.linspace(0, 1, 21)
    theirs = best_c + np.exp(slope * held_out + offset)
    law = fit_mixing_law(np.stack([x, 1 - x], 1), y, delta=0.02)
    ours = law.predict(np.stack([held_out, 1 - held_out], 1))[:, 0]
    truth = 1.4 + np.exp(-2.4 * held_out - 0.6)
    np.testing.assert_allclose(ours, theirs, atol=0.003)
    assert abs(ours - truth).max() <= abs(theirs - truth).max() + 0.002


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    r, generator = _simplex(5), np.random.default_rng(4)
    probe = np.array([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]])
    truth = np.array(_law(C, K, T, probe))
    hits = []
    for seed in range(12):
        y = np.array(_law(C, K, T, r)) + 0.005 * generator.standard_normal((len(r), 3))
        low, high = fit_mixing_law(r, y, bootstrap=40, seed=seed).interval(probe)
        hits.append((low <= truth) & (truth <= high))
    assert 0.75 <= np.mean(hits) <= 0.99


def test_spread_of_the_best_mixture_and_seed():
    r = _simplex(5)
    y = np.array(_law(C, K, T, r)) + 0.005 * np.random.default_rng(5).standard_normal((len(r), 3))
    first, again, other = (fit_mixing_law(r, y, bootstrap=20, seed=seed).best_mixture() for seed in (0, 0, 1))
    assert first == again != other
    assert all(low <= share <= high for low, share, high in zip(first.low, first.mixture, first.high, strict=True))
    assert max(np.subtract(first.high, first.low)) > 0.01


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"mixtures": [[0.5, 0.4]] * 5}, "sum 1"),
        ({"mixtures": [[0.5, 0.5]] * 11}, "needs at least 4 different mixtures"),
        ({"losses": np.ones((3, 1))}, "losses must be finite"),
        ({"delta": 0.0}, "delta and starts"),
        ({"floor": 5.0}, "floor must lie below"),
    ],
)
def test_wrong_usage(change, text):
    x = np.linspace(0, 1, 11)
    given = {"mixtures": np.stack([x, 1 - x], 1), "losses": 1 + np.exp(-x), **change}
    with pytest.raises(UsageError, match=text):
        fit_mixing_law(given.pop("mixtures"), given.pop("losses"), **given)


def test_wrong_usage_of_a_law():
    r = _simplex(5)
    law = fit_mixing_law(r, _law(C, K, T, r))
    for call, text in [
        (lambda: law.predict([[0.5, 0.5]]), r"mixtures must be \[N, 3\]"),
        (lambda: law.interval(r), "bootstrap=200"),
        (lambda: law.best_mixture([1, -1, 1]), "weights must be 3"),
        (lambda: law.best_mixture(largest=[0.3, 0.3, 0.3]), "largest must be 3"),
    ]:
        with pytest.raises(UsageError, match=text):
            call()


def test_sources_must_vary_on_their_own():
    x = np.linspace(0, 1, 9)
    with pytest.raises(UsageError, match="span all proportions"):
        fit_mixing_law(np.stack([x, (1 - x) / 2, (1 - x) / 2], 1), 1 + np.exp(-x))
