"""Shampoo against its equations in numpy, in float64, over blocks, grafts, frequencies and shapes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from trimtab.errors import UsageError
from trimtab.optim import Shampoo
from trimtab.optim.matrix.shampoo import inverse_root
from trimtab.testing import OptimizerTestCase


class TestShampoo(OptimizerTestCase):
    elementwise = False

    def optimizer(self, params, **options):
        # A large eps: the first gradients leave the factors singular, where the ways of running may differ by rounding.
        return Shampoo(params, **{"lr": self.lr, "precondition_frequency": 2, "eps": 1e-4, **options})


def _stream(shape, steps=125):
    generator = torch.Generator().manual_seed(11)
    base = torch.randn(shape, generator=generator, dtype=torch.float64)
    for step in range(steps):
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        yield (1000 if step in (20, 77) else 1) * (base / 2 + noise)


def _power(A, exponent, eps):
    values, vectors = np.linalg.eigh(A)
    return vectors @ np.diag((np.maximum(values, 0) + eps) ** -exponent) @ vectors.T


class _Block:
    """One block, by the paper's equations."""

    def __init__(self, sides):
        self.factors = [np.zeros((n, n)) for n in sides]
        self.roots = []


def _reference(p, grads, *, lr, betas, eps, size, every, start, exponents, graft, graft_eps, decay):
    beta1, beta2 = betas
    sum_up = beta2 == 1
    m, v = np.zeros_like(p), np.zeros_like(p)
    cuts = [[(i, min(i + size, n)) for i in range(0, n, size)] for n in p.shape]
    index = [(a, b) for a in cuts[0] for b in cuts[1]] if p.ndim == 2 else [(a,) for a in cuts[0]]
    blocks = [_Block([stop - first for first, stop in cut]) for cut in index]
    for t, g in enumerate(grads, start=1):
        m = beta1 * m + (1 - beta1) * g
        n = m / (1 - beta1**t)
        v = v + g * g if graft == "adagrad" or sum_up else beta2 * v + (1 - beta2) * g * g
        v_hat = v / (1 - beta2**t) if graft == "adam" and not sum_up else v
        d = n if graft in ("sgd", "none") else n / (np.sqrt(v_hat) + graft_eps)
        u = np.zeros_like(p)
        for cut, block in zip(index, blocks, strict=True):
            where = tuple(slice(*part) for part in cut)
            G = g[where]
            grams = [np.outer(G, G)] if G.ndim == 1 else [G @ G.T, G.T @ G]
            for i, gram in enumerate(grams):
                block.factors[i] = block.factors[i] + gram if sum_up else beta2 * block.factors[i] + (1 - beta2) * gram
            if t == start or (t > start and t % every == 0):
                fix = 1 if sum_up else 1 / (1 - beta2**t)
                block.roots = [_power(factor * fix, exponents[G.ndim - 1], eps) for factor in block.factors]
            if t < start:
                u[where] = d[where]
                continue
            s = block.roots[0] @ n[where]
            if G.ndim == 2:
                s = s @ block.roots[1]
            if graft != "none":
                s = s * np.linalg.norm(d[where]) / np.linalg.norm(s)
            u[where] = s
        p = p - lr * decay * p - lr * u
    return p


_SETTINGS = {
    "adam": {},
    "blocks": {"block_size": 3, "grafting": "adam"},
    "adagrad": {"betas": (0.9, 1.0), "grafting": "adagrad", "start_preconditioning_step": 7},
    "rmsprop": {"betas": (0.0, 0.9), "grafting": "rmsprop", "precondition_frequency": 1},
    "sgd": {"betas": (0.5, 0.95), "grafting": "sgd", "block_size": 4, "weight_decay": 0.3},
    "none": {"betas": (0.9, 1.0), "grafting": "none", "exponent_override": (0.5, 0.5), "weight_decay": 0.1},
}


@pytest.mark.parametrize("setting", _SETTINGS)
@pytest.mark.parametrize("shape", [(5, 7), (6, 2, 2), (5,), (1, 4), (4, 1)], ids=str)
def test_equals_the_equations(shape, setting):
    options = {"betas": (0.9, 0.99), "eps": 1e-6, "precondition_frequency": 5, **_SETTINGS[setting]}
    start = torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    p = nn.Parameter(start.clone())
    optimizer = Shampoo([p], lr=0.05, **options)
    for grad in _stream(shape):
        p.grad = grad
        optimizer.step()
    flat = (shape[0], int(np.prod(shape[1:]))) if len(shape) > 1 else shape
    flat = flat if min(flat) > 1 else (int(np.prod(flat)),)
    every = options["precondition_frequency"]
    expected = _reference(
        start.reshape(flat).numpy().copy(),
        [grad.reshape(flat).numpy() for grad in _stream(shape)],
        lr=0.05,
        betas=options["betas"],
        eps=options["eps"],
        size=options.get("block_size", 1024),
        every=every,
        start=options.get("start_preconditioning_step", every),
        exponents=options.get("exponent_override", (1 / 2, 1 / 4)),
        graft=options.get("grafting", "adam"),
        graft_eps=1e-8,
        decay=options.get("weight_decay", 1e-5),
    )
    np.testing.assert_allclose(p.detach().reshape(flat).numpy(), expected, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("shape", [(4, 6), (5, 5), (6, 3)], ids=str)
def test_first_step_is_the_polar_factor(shape):
    """(G G^T)^(-1/4) G (G^T G)^(-1/4) = U V^T."""
    p = nn.Parameter(torch.zeros(shape, dtype=torch.float64))
    p.grad = next(_stream(shape))
    U, _, Vh = torch.linalg.svd(p.grad, full_matrices=False)
    Shampoo([p], lr=1.0, precondition_frequency=1, grafting="none", eps=1e-14, weight_decay=0.0).step()
    torch.testing.assert_close(p.detach(), -U @ Vh, rtol=0, atol=1e-5)


def test_turns_with_the_basis():
    """Without a graft of entries, a rotated problem has rotated steps."""
    Q, _ = torch.linalg.qr(torch.randn(5, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64))
    results = []
    for turn in (torch.eye(5, dtype=torch.float64), Q):
        p = nn.Parameter(torch.zeros(5, 3, dtype=torch.float64))
        optimizer = Shampoo([p], lr=0.1, precondition_frequency=3, grafting="sgd", weight_decay=0.0, eps=1e-8)
        for grad in _stream((5, 3), steps=20):
            p.grad = turn @ grad
            optimizer.step()
        results.append(turn.T @ p.detach())
    torch.testing.assert_close(results[0], results[1], rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_inverse_root(dtype):
    X = torch.randn(9, 4, generator=torch.Generator().manual_seed(1), dtype=dtype)
    A = X.T @ X
    root = inverse_root(A, 0.25, 1e-6)
    eye = torch.eye(4, dtype=dtype)
    bound = 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(torch.linalg.matrix_power(root, 4) @ (A + 1e-6 * eye), eye, rtol=0, atol=10 * bound)
    lifted = inverse_root(A - 30 * eye, 0.5, 1.0)  # not positive: lifted to a least eigenvalue of 1
    assert torch.linalg.eigvalsh(lifted).max() == pytest.approx(1, abs=1e-3)


def test_falls_back_to_float64(monkeypatch):
    eigh = torch.linalg.eigh
    asked = []

    def fails_in_float32(A):
        asked.append(A.dtype)
        if A.dtype == torch.float32:
            raise torch.linalg.LinAlgError("did not converge")
        return eigh(A)

    monkeypatch.setattr(torch.linalg, "eigh", fails_in_float32)
    torch.testing.assert_close(inverse_root(4 * torch.eye(3), 0.5, 0.0), torch.eye(3) / 2)
    assert asked == [torch.float32, torch.float64]
    monkeypatch.setattr(torch.linalg, "eigh", lambda A: (A.diagonal() * torch.nan, A))
    with pytest.raises(RuntimeError, match="no eigenvalues in float64"):
        inverse_root(torch.eye(3), 0.5, 0.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"betas": (0.9, 1.1)}, r"betas\[1\] must be in"),
        ({"eps": 0.0}, "eps must be in"),
        ({"block_size": 0}, "block_size must be a whole number"),
        ({"precondition_frequency": 1.5}, "precondition_frequency must be a whole number"),
        ({"start_preconditioning_step": 0}, "start_preconditioning_step must be a whole number"),
        ({"grafting": "adan"}, "Did you mean 'adam'"),
        ({"exponent_override": (0.5,)}, "exponent_override must be 2 numbers"),
    ],
    ids=str,
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        Shampoo([nn.Parameter(torch.zeros(2, 2))], **options)
