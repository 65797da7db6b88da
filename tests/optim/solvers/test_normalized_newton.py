"""Gradient-regularised Newton against its rule in numpy, and its claim on logistic and softmax regression."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from trimtab.errors import UsageError
from trimtab.optim.solvers.normalized_newton import Composite, NormalizedNewton, minimize


def _data(classes, n=60, d=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, dtype=torch.float64, generator=generator)
    teacher = torch.randn(d, classes, dtype=torch.float64, generator=generator)
    noise = torch.randn(n, classes, dtype=torch.float64, generator=generator)
    return x, (x @ teacher + 2 * noise).argmax(dim=1)


def _hessian(fn):
    return lambda x: torch.autograd.functional.hessian(fn, x)


def _log1pexp(z):
    return torch.logaddexp(z, torch.zeros_like(z))  # softplus is approximate beyond 20


def _logistic():
    x, y = _data(2)
    sign = 2.0 * y - 1
    return Composite(lambda z: _log1pexp(-sign * z).mean(), lambda w: x @ w), x, sign


def _softmax():
    x, y = _data(3)
    # The last class is the reference, so that the minimum is unique.
    pad = torch.zeros(len(x), 1, dtype=x.dtype)
    inner = lambda w: torch.cat([x @ w.reshape(4, 2), pad], dim=1)  # noqa: E731
    return Composite(lambda z: F.cross_entropy(z, y), inner)


def _losses(problem):
    """Per-example losses of the logistic problem, for the Fisher matrix."""
    _, x, sign = problem
    return Composite(torch.mean, lambda w: _log1pexp(-sign * (x @ w)))


def _oracle(x, sign, w, *, gamma, steps):
    """Algorithm 1 with the adaptive search, written out for logistic regression."""
    x, sign, w = x.numpy(), sign.numpy(), w.numpy().copy()
    n, d = x.shape

    def value(w):
        return np.logaddexp(0, -sign * (x @ w)).mean()

    def gradient(w):
        return -(x * (sign / (1 + np.exp(sign * (x @ w))))[:, None]).mean(axis=0)

    values = [value(w)]
    for _ in range(steps):
        p = 1 / (1 + np.exp(-(x @ w)))
        hessian = (x.T * (p * (1 - p))) @ x / n
        g = gradient(w)
        while True:
            lam = np.sqrt(g @ g) / gamma
            new = w - np.linalg.solve(hessian + lam * np.eye(d), g)
            if value(w) - value(new) >= gradient(new) @ gradient(new) / (8 * lam):
                break
            gamma /= 2
        gamma, w = 2 * gamma, new
        values.append(value(w))
    return w, values, gamma


@pytest.mark.parametrize("hessian", ["exact", "gauss-newton"])
def test_equals_the_rule_in_numpy(hessian):
    fn, x, sign = _logistic()
    start = torch.full((4,), 6.0, dtype=torch.float64)
    result = minimize(fn, start, hessian=hessian, gamma=100.0, tolerance=0, max_iterations=6)
    w, values, gamma = _oracle(x, sign, start, gamma=100.0, steps=6)
    assert result.iterations == 6
    np.testing.assert_allclose([entry.f for entry in result.trace], values, rtol=1e-12)
    np.testing.assert_allclose(result.x.numpy(), w, rtol=1e-9)
    assert result.trace[-1].gamma == gamma / 2
    assert max(entry.solves for entry in result.trace) > 1  # the search has been at work


def test_approximations_are_their_formulas():
    fn, x, sign = _logistic()
    w = torch.tensor([0.3, -0.2, 0.5, 0.1], dtype=torch.float64)
    p = torch.sigmoid(x @ w)
    torch.testing.assert_close(fn.gauss_newton(w), (x.T * (p * (1 - p))) @ x / len(x))
    torch.testing.assert_close(fn.gauss_newton(w), _hessian(fn)(w))
    residual = torch.sigmoid(-sign * (x @ w))
    torch.testing.assert_close(_losses((fn, x, sign)).fisher(w), (x.T * residual**2) @ x / len(x))
    # The authors' weighted Gauss-Newton matrix of log-sum-exp, A^T diag(pi) A / mu at mu = 1.
    pi = torch.softmax(x @ w, dim=0)
    torch.testing.assert_close(Composite(lambda z: z.logsumexp(0), lambda w: x @ w).fisher(w), (x.T * pi) @ x)


@pytest.mark.parametrize("scale", [20.0, 100.0])
@pytest.mark.parametrize("case", ["logistic exact", "logistic fisher", "softmax exact", "softmax gauss-newton"])
def test_converges_from_far_where_newton_diverges(case, scale):
    name, hessian = case.split()
    fn = _softmax() if name == "softmax" else _logistic()[0]
    if hessian == "fisher":
        fn = _losses(_logistic())
    size = 8 if name == "softmax" else 4
    start = scale * torch.ones(size, dtype=torch.float64)

    newton = start.clone()
    for _ in range(10):  # plain Newton: exact Hessian, full steps
        if newton.abs().max() > 10 * scale:
            break
        newton = newton - torch.linalg.pinv(_hessian(fn)(newton)) @ torch.func.grad(fn)(newton)
    assert not fn(newton) < 2 * fn(start)

    result = minimize(fn, start, hessian=hessian, tolerance=1e-7, max_iterations=400)
    assert result.status == "converged"
    values = np.array([entry.f for entry in result.trace])
    assert (np.diff(values) <= 1e-14 * values[0]).all()
    # Linear rate: once the gap is below 1, ten more steps take off at least a third of it, down to rounding.
    gap = values - values[-1]
    gap = gap[(gap < 1) & (gap > 1e-9)]
    assert len(gap) > 2
    assert (gap[10:] <= 0.67 * gap[:-10]).all()
    assert np.polyfit(np.arange(len(gap)), np.log(gap), 1)[0] < -0.1


@pytest.mark.parametrize("hessian", ["exact", "gauss-newton", "fisher"])
def test_fewer_than_gradient(hessian):
    problem = _logistic()
    fn = _losses(problem) if hessian == "fisher" else problem[0]
    start = torch.full((4,), 20.0, dtype=torch.float64)
    best = minimize(fn, start, tolerance=1e-12).f
    target = best + 1e-6
    result = minimize(fn, start, hessian=hessian, tolerance=1e-10)
    steps = next(k for k, entry in enumerate(result.trace) if entry.f <= target)
    lipschitz = 0.25 * torch.linalg.matrix_norm(problem[1], 2) ** 2 / len(problem[1])
    x, count = start.clone(), 0
    while fn(x) > target and count < 5000:
        x = x - torch.func.grad(fn)(x) / lipschitz
        count += 1
    # The empirical Fisher matrix overestimates the curvature far away: there it gains little over gradient steps.
    assert steps < (count if hessian == "fisher" else count / 3)


def test_indefinite_hessian_and_saddle():
    fn = lambda x: (x[0] ** 2 - 1) ** 2 + x[1] ** 2  # noqa: E731
    result = minimize(fn, torch.tensor([0.1, 1.0], dtype=torch.float64))
    assert result.status == "converged"
    assert abs(abs(result.x[0].item()) - 1) < 1e-6


def test_hessian_that_overflows_is_named():
    result = minimize(lambda x: x.square().sum(), torch.ones(2), hessian=lambda x: torch.full((2, 2), torch.inf))
    assert (result.status, result.iterations) == ("non-finite", 0)


def test_optimizer_takes_the_same_steps_and_resumes():
    fn = _logistic()[0]
    w = torch.nn.Parameter(torch.full((4,), 3.0, dtype=torch.float64))
    optimizer = NormalizedNewton([w], gamma=50.0)
    losses = [optimizer.step(lambda: fn(w)).item() for _ in range(3)]
    saved = optimizer.state_dict()
    other = NormalizedNewton([w], gamma=1.0)
    other.load_state_dict(saved)
    losses += [other.step(lambda: fn(w)).item() for _ in range(3)]
    trace = minimize(fn, torch.full((4,), 3.0, dtype=torch.float64), gamma=50.0, max_iterations=6, tolerance=0).trace
    np.testing.assert_allclose(losses, [entry.f for entry in trace[:6]], rtol=1e-10)


def test_refusals():
    fn = _logistic()[0]
    start = torch.zeros(4, dtype=torch.float64)
    with pytest.raises(UsageError, match="gamma must be positive, got 0"):
        minimize(fn, start, gamma=0)
    with pytest.raises(UsageError, match=r"unknown hessian 'gaus-newton'\. Did you mean 'gauss-newton'"):
        minimize(fn, start, hessian="gaus-newton")
    with pytest.raises(UsageError, match=r"needs fn to be a Composite\(outer, inner\)"):
        minimize(lambda x: x.sum(), start, hessian="fisher")
    with pytest.raises(UsageError, match="floating-point vector"):
        minimize(fn, torch.zeros(2, 2))
    with pytest.raises(UsageError, match="one parameter group, got 2"):
        NormalizedNewton([{"params": [torch.zeros(1)]}, {"params": [torch.zeros(1)]}])
