"""L2O-PA against its equations in numpy, ISTA and FISTA, and its claim out of distribution."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from trimtab.errors import UsageError
from trimtab.optim.learned.l2o_pa import L2OPA, BlackBoxLSTM, lasso, logistic_l1, meta_train


def _draw(generator, *, batch=16, m=10, n=20, sparsity=3, size=1.0, spread=1.0, rho=0.1, dtype=torch.float32):
    """Sparse recovery: unit columns, sparse solutions of a given size, columns shrunk to a given spread."""
    a = torch.randn(batch, m, n, generator=generator, dtype=dtype)
    a = a / a.norm(dim=1, keepdim=True)
    a = a * torch.linspace(1, spread, n, dtype=dtype)
    x = torch.randn(batch, n, generator=generator, dtype=dtype)
    keep = torch.rand(batch, n, generator=generator).argsort(dim=1) < sparsity
    return lasso(a, (a @ (size * x * keep).unsqueeze(-1)).squeeze(-1), rho=rho)


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


def _fista(problem, steps, momentum=True):
    x = y = torch.zeros(problem.size, dtype=problem.lipschitz.dtype)
    t = 1.0
    for _ in range(steps):
        z = y - problem.gradient(y) / problem.lipschitz
        new = z.sign() * (z.abs() - problem.rho / problem.lipschitz).clamp(min=0)
        t_new = (1 + (1 + 4 * t * t) ** 0.5) / 2
        y = new + ((t - 1) / t_new if momentum else 0) * (new - x)
        x, t = new, t_new
    return x


def _sigmoid(x):
    return 1 / (1 + np.exp(-x))


@pytest.mark.parametrize("terms", [("p", "a"), ("p", "a", "b", "b1", "b2")], ids="-".join)
def test_equals_its_equations(terms):
    """One problem, one LSTM layer, written out coordinate by coordinate."""
    rule = L2OPA(hidden=3, layers=1, terms=terms, generator=_generator(5)).double()
    problem = _draw(_generator(1), batch=1, m=4, n=5, dtype=torch.float64)
    y_model, _ = rule.solve(problem, 4)

    w = {name: value.detach().numpy() for name, value in rule.named_parameters()}
    bias = w["lstm.bias_ih_l0"] + w["lstm.bias_hh_l0"]
    lipschitz = problem.lipschitz.item()

    def gradient(x):
        return problem.gradient(torch.from_numpy(x)[None])[0].numpy()

    x, y = np.zeros(5), np.zeros(5)
    h, c = np.zeros((5, 3)), np.zeros((5, 3))
    for _ in range(4):
        g, old_g, new = gradient(y), gradient(x), np.zeros(5)
        coefficient = {"p": np.ones(5), "a": np.zeros(5), "b": np.ones(5), "b1": np.zeros(5), "b2": np.zeros(5)}
        for i in range(5):
            gates = w["lstm.weight_ih_l0"] @ np.array([g[i], y[i]]) + w["lstm.weight_hh_l0"] @ h[i] + bias
            into, forget, cell, out = np.split(gates, 4)
            c[i] = _sigmoid(forget) * c[i] + _sigmoid(into) * np.tanh(cell)
            h[i] = _sigmoid(out) * np.tanh(c[i])
            middle = np.maximum(w["middle.weight"] @ h[i] + w["middle.bias"], 0)
            for term in terms:
                raw = (w[f"heads.{term}.weight"] @ middle + w[f"heads.{term}.bias"])[0]
                coefficient[term][i] = raw if term in ("b1", "b2") else 2 * _sigmoid(raw)
            p, b = coefficient["p"][i] * 0.9999 / lipschitz, coefficient["b"][i]
            point = b * (y[i] - p * g[i]) + (1 - b) * (x[i] - p * old_g[i]) + coefficient["b1"][i]
            new[i] = np.sign(point) * max(abs(point) - p * problem.rho, 0)
        y = new + coefficient["a"] * (new - x) + coefficient["b2"]
        x = new
    np.testing.assert_allclose(y_model[0].numpy(), y, rtol=1e-10, atol=1e-14)


def test_is_ista_and_fista_with_their_coefficients():
    problem = _draw(_generator(2), dtype=torch.float64)
    rule = L2OPA(terms=()).double()
    y, _ = rule.solve(problem, 30)
    # The authors' step is 0.9999 / L.
    torch.testing.assert_close(y, _fista(problem, 30, momentum=False), rtol=0, atol=1e-4)

    t, count = [1.0], 30
    for _ in range(count):
        t.append((1 + (1 + 4 * t[-1] ** 2) ** 0.5) / 2)
    coefficients = iter((t[k] - 1) / t[k + 1] for k in range(count))
    rule._coefficients = lambda out, shape: {"p": 1 / 0.9999, "a": next(coefficients), "b1": 0.0, "b2": 0.0}
    state = rule.start(problem)
    for _ in range(count):
        state = rule.step(problem, state)
    torch.testing.assert_close(state.x, _fista(problem, count), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["lasso", "logistic"])
def test_solutions_are_fixed_points(kind):
    """Whatever its weights, the rule stays at a solution; the black box does not."""
    if kind == "lasso":
        problem = _draw(_generator(3), dtype=torch.float64)
    else:
        a = torch.randn(4, 30, 6, generator=_generator(3), dtype=torch.float64)
        problem = logistic_l1(a, (a.sum(dim=-1) > 0).double(), rho=0.02)
    solution = _fista(problem, 20_000)
    rule = L2OPA(generator=_generator(7)).double()
    y, _ = rule.solve(problem, 5, x0=solution)
    torch.testing.assert_close(y, solution, rtol=0, atol=1e-7)
    y, _ = BlackBoxLSTM(generator=_generator(7)).double().solve(problem, 5, x0=solution)
    assert (y - solution).abs().max() > 1e-3


def test_problems_have_their_gradients_and_lipschitz_constants():
    a = torch.randn(2, 7, 3, generator=_generator(0), dtype=torch.float64)
    y = (torch.rand(2, 7, generator=_generator(1), dtype=torch.float64) > 0.5).double()
    x = torch.randn(2, 3, generator=_generator(2), dtype=torch.float64)
    for problem in (lasso(a, y), logistic_l1(a, y)):
        torch.testing.assert_close(problem.gradient(x), torch.func.grad(lambda z, f=problem: f.smooth(z).sum())(x))
        for k in range(2):
            at = torch.zeros(2, 3, dtype=torch.float64)
            hessian = torch.autograd.functional.jacobian(problem.gradient, at)[k, :, k]
            assert torch.linalg.matrix_norm(hessian, 2) <= problem.lipschitz[k, 0] * (1 + 1e-9)


def test_holds_out_of_distribution_where_the_black_box_does_not():
    structured, black_box = L2OPA(), BlackBoxLSTM()
    for rule in (structured, black_box):
        meta_train(rule, _draw, generator=_generator(0), steps=60, length=40, unroll=20)

    def gap(rule, steps, **shift):
        problem = _draw(_generator(99), **shift)
        best = problem.value(_fista(problem, 4000))
        _, values = rule.solve(problem, steps)
        return ((values[-1] - best) / best).median().item()

    assert gap(structured, 40) < 0.05
    assert gap(black_box, 40) < 1.0  # it has learned its own distribution
    shift = {"size": 10.0, "spread": 0.2, "rho": 0.3}
    assert gap(structured, 400, **shift) < 0.02
    assert gap(black_box, 400, **shift) > 0.3
    ista = _draw(_generator(99), **shift)
    best = ista.value(_fista(ista, 4000))
    after_ista = ((ista.value(_fista(ista, 400, momentum=False)) - best) / best).median().item()
    assert gap(structured, 400, **shift) < 2 * after_ista + 1e-3


def test_refusals():
    with pytest.raises(UsageError, match="unknown term 'c'"):
        L2OPA(terms=("p", "c"))
    with pytest.raises(UsageError, match="hidden and layers must be at least 1, got 0 and 2"):
        L2OPA(hidden=0)
    with pytest.raises(UsageError, match="length must be a multiple of unroll = 20, got 30"):
        meta_train(L2OPA(), _draw, generator=_generator(), length=30)
