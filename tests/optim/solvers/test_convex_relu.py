"""Convex ReLU training against dense ADMM, a generic solver, a certificate of optimality, and gradient descent."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.optimize
import torch
from scipy.linalg import block_diag

from trimtab.errors import UsageError
from trimtab.optim.solvers.convex_relu import (
    activation_patterns,
    convex_relu_admm,
    convex_relu_sampled,
    relu_objective,
)


def _problem(n=10, seed=0, noise=0.1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.linspace(-1, 1, n, dtype=torch.float64) + 0.05 * torch.randn(n, dtype=torch.float64, generator=generator)
    y = (3 * x).sin() + noise * torch.randn(n, dtype=torch.float64, generator=generator)
    x = torch.stack([x, torch.ones_like(x)], dim=1)
    return x, y, activation_patterns(x, 20_000, generator=generator)


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("rho", "dual_step"), [(0.5, None), (0.2, 0.05)])
def test_admm_equals_dense_updates(rho, dual_step):
    """Algorithm 3.1 with the full matrices F and G, in numpy."""
    generator = _generator(3)
    x = torch.randn(7, 3, dtype=torch.float64, generator=generator)
    y = torch.randn(7, dtype=torch.float64, generator=generator)
    patterns = activation_patterns(x, 6, generator=generator)
    beta, steps, options = 0.05, 12, {"rho": rho, "dual_step": dual_step, "tolerance": 0}
    result = convex_relu_admm(x, y, patterns, beta=beta, max_iterations=steps, **options)

    a, b, diagonals = x.numpy(), y.numpy(), [np.diag(column) for column in patterns.numpy().T]
    f = np.hstack([d @ a for d in diagonals] + [-d @ a for d in diagonals])
    g = block_diag(*[(2 * d - np.eye(7)) @ a for d in diagonals] * 2)
    v, lam = np.zeros(f.shape[1]), np.zeros(f.shape[1])
    s, nu = np.zeros(len(g)), np.zeros(len(g))
    expected = []
    for _ in range(steps):
        left = np.eye(len(v)) + f.T @ f / rho + g.T @ g
        u = np.linalg.solve(left, f.T @ b / rho + v - lam + g.T @ (s - nu))
        v = (u + lam).copy()
        for i in range(0, len(v), 3):
            v[i : i + 3] *= max(0, 1 - beta / (rho * max(np.linalg.norm(v[i : i + 3]), 1e-9)))
        s = np.maximum(g @ u + nu, 0)
        lam += (dual_step or rho) / rho * (u - v)
        nu += (dual_step or rho) / rho * (g @ u - s)
        norms = sum(np.linalg.norm(v[i : i + 3]) for i in range(0, len(v), 3))
        expected.append(0.5 * np.sum((f @ v - b) ** 2) + beta * norms)
    np.testing.assert_allclose(result.trace, expected, rtol=1e-9)


def test_equals_a_generic_solver():
    """SLSQP on the same program with its norms smoothed by 1e-7."""
    x, y, patterns = _problem(n=6)
    beta, count = 0.05, patterns.shape[1]
    assert count == 12
    a, b, p = x.numpy(), y.numpy(), np.hstack([patterns.numpy()] * 2).T
    sign = np.repeat([1.0, -1.0], count)
    cone = block_diag(*[(2 * row - 1)[:, None] * a for row in p])

    def objective(z):
        z = z.reshape(-1, 2)
        residual = np.einsum("i,in,in->n", sign, p, z @ a.T) - b
        norms = np.sqrt((z**2).sum(axis=1) + 1e-14)
        gradient = (sign[:, None] * p * residual) @ a + beta * z / norms[:, None]
        return 0.5 * residual @ residual + beta * norms.sum(), gradient.ravel()

    constraints = {"type": "ineq", "fun": lambda z: cone @ z, "jac": lambda z: cone}
    start = 0.1 * np.random.default_rng(0).standard_normal(4 * count)
    solved = scipy.optimize.minimize(
        objective, start, jac=True, method="SLSQP", constraints=constraints, options={"maxiter": 2000, "ftol": 1e-13}
    )
    result = convex_relu_admm(x, y, patterns, beta=beta)
    assert result.converged
    assert result.objective == pytest.approx(solved.fun, abs=1e-4)
    assert result.violation < 1e-5


def _lower_bound(x, y, weights, alphas, beta):
    """Value of the dual at the scaled residual, over a fine grid of unit vectors: no network of any width is below."""
    angles = torch.linspace(0, 2 * torch.pi, 200_001, dtype=x.dtype)
    units = torch.stack([angles.cos(), angles.sin()])
    residual = y - torch.relu(x @ weights.T) @ alphas
    dual = residual * min(1.0, beta / (residual @ torch.relu(x @ units)).abs().max().item())
    return (0.5 * y.square().sum() - 0.5 * (y - dual).square().sum()).item()


@pytest.mark.parametrize("beta", [0.3, 0.03, 0.003])
def test_network_is_globally_optimal(beta):
    x, y, patterns = _problem()
    result = convex_relu_admm(x, y, patterns, beta=beta)
    value = relu_objective(x, y, result.weights, result.alphas, beta=beta).item()
    assert value == pytest.approx(result.objective, abs=1e-5)
    assert value - _lower_bound(x, y, result.weights, result.alphas, beta) < 1e-4
    module = result.module()
    torch.testing.assert_close(module(x).squeeze(-1), result.predict(x))


def test_no_worse_than_many_restarts():
    x, y, patterns = _problem(n=12, seed=1)
    beta = 0.02
    result = convex_relu_admm(x, y, patterns, beta=beta)
    value = relu_objective(x, y, result.weights, result.alphas, beta=beta).item()
    # 60 networks at once, of twice the neurons that the optimum needs.
    generator, width = _generator(5), 2 * len(result.alphas)
    weights = torch.randn(60, width, 2, dtype=x.dtype, generator=generator).requires_grad_()
    alphas = torch.randn(60, width, dtype=x.dtype, generator=generator).requires_grad_()
    optimizer = torch.optim.SGD([weights, alphas], lr=0.02, momentum=0.9)
    for _ in range(2500):
        losses = torch.func.vmap(lambda w, a: relu_objective(x, y, w, a, beta=beta))(weights, alphas)
        optimizer.zero_grad()
        losses.sum().backward()
        optimizer.step()
    finite = losses.detach()[losses.detach().isfinite()]
    assert len(finite) > 50
    assert value <= finite.min().item() + 1e-5
    assert finite.min().item() < 1.5 * value  # a fair opponent
    assert finite.median().item() > value + 1e-4


def test_converges_linearly():
    x, y, patterns = _problem(n=8)
    trace = np.array(convex_relu_admm(x, y, patterns, beta=0.2, tolerance=1e-12, max_iterations=40_000).trace)
    gap = np.abs(trace - trace[-1])
    envelope = np.log([gap[i : i + 200].max() for i in range(2000, 10_000, 200)])
    slope, _ = np.polyfit(np.arange(len(envelope)), envelope, 1)
    assert slope < -0.2
    assert np.corrcoef(np.arange(len(envelope)), envelope)[0, 1] < -0.999


def test_sampled_program_meets_its_optimality():
    x, y, _ = _problem(n=10)
    beta = 0.03
    result = convex_relu_sampled(x, y, 300, beta=beta, generator=_generator(2), tolerance=1e-7)
    assert result.converged
    assert relu_objective(x, y, result.weights, result.alphas, beta=beta).item() == pytest.approx(result.objective)
    # Conditions of the lasso over the same draw: correlations of at most beta, equal to it with the sign of alpha.
    u = torch.randn(300, 2, generator=_generator(2), dtype=x.dtype)
    features = torch.relu(x @ (u / u.norm(dim=1, keepdim=True)).T)
    correlation = features.T @ (y - result.predict(x))
    assert correlation.abs().max() <= beta * (1 + 1e-4)
    size = torch.relu(x @ (result.weights / result.weights.norm(dim=1, keepdim=True)).T).T @ (y - result.predict(x))
    torch.testing.assert_close(size, beta * result.alphas.sign(), rtol=1e-3, atol=1e-5)


def test_sampling_approaches_the_optimum():
    x, y, patterns = _problem(n=10)
    exact = convex_relu_admm(x, y, patterns, beta=0.03).objective
    gaps = [
        convex_relu_sampled(x, y, neurons, beta=0.03, generator=_generator(1)).objective - exact
        for neurons in (10, 100, 3000)
    ]
    assert gaps[0] > gaps[1] > gaps[2] > -1e-4
    assert gaps[2] < 0.02 * exact


def test_patterns_are_all_there_for_two_inputs():
    _, _, patterns = _problem(n=10)
    assert patterns.shape == (10, 20)
    assert set(patterns.unique().tolist()) == {0.0, 1.0}


def test_refusals():
    x, y, patterns = _problem(n=6)
    with pytest.raises(UsageError, match="beta must be positive, got 0"):
        convex_relu_admm(x, y, patterns, beta=0)
    with pytest.raises(UsageError, match="rho and dual_step must be positive"):
        convex_relu_admm(x, y, patterns, beta=1, rho=-1)
    with pytest.raises(UsageError, match=r"patterns must be \[N, P\] with N = 6"):
        convex_relu_admm(x, y, patterns[1:], beta=1)
    with pytest.raises(UsageError, match="one floating-point dtype"):
        convex_relu_admm(x, y.float(), patterns, beta=1)
    with pytest.raises(UsageError, match="neurons must be at least 1"):
        convex_relu_sampled(x, y, 0, beta=1, generator=_generator())
    with pytest.raises(UsageError, match="count must be at least 1"):
        activation_patterns(x, 0, generator=_generator())
