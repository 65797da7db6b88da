"""ROOT against its equations in numpy, its quantile against numpy's, and its coefficients on sampled matrices."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from trimtab.errors import UsageError
from trimtab.optim import ROOT, Chain, newton_coefficients, robust_orthogonalize
from trimtab.testing import OptimizerTestCase


class TestROOT(OptimizerTestCase):
    elementwise = False

    def optimizer(self, params, **options):
        return ROOT(params, **{"lr": self.lr, **options})


def _stream(shape, steps=125):
    generator = torch.Generator().manual_seed(5)
    base = torch.randn(shape, generator=generator, dtype=torch.float64)
    for step in range(steps):
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        yield (1000 if step in (20, 77) else 1) * (base + noise)


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("quantile", [0.5, 0.9, 1.0])
@pytest.mark.parametrize("shape", [(6, 4), (4, 9), (1, 7), (3, 2, 2, 2)], ids=str)
def test_equals_the_equations(shape, quantile, nesterov):
    start = torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    p = nn.Parameter(start.clone())
    options = {"quantile": quantile, "nesterov": nesterov, "momentum": 0.9, "ns_eps": 1e-30}
    optimizer = ROOT([p], lr=0.02, weight_decay=0.2, **options)
    rows, columns = shape[0], int(np.prod(shape[1:]))
    a, b, c = newton_coefficients(rows, columns)
    expected, total = start.numpy().reshape(rows, columns).copy(), np.zeros((rows, columns))
    for grad in _stream(shape):
        p.grad = grad
        optimizer.step()
        g = grad.numpy().reshape(rows, columns)
        total = 0.9 * total + g
        n = g + 0.9 * total if nesterov else total
        t = np.quantile(np.abs(n), quantile)
        O = np.sign(n) * np.maximum(np.abs(n) - t, 0)  # noqa: E741
        X = (n - O) / np.linalg.norm(n - O)
        for _ in range(5):
            G = X.T @ X
            X = a * X + b * X @ G + c * X @ G @ G
        expected = expected * (1 - 0.02 * 0.2) - 0.02 * 0.2 * max(rows, columns) ** 0.5 * X
    np.testing.assert_allclose(p.detach().numpy().reshape(rows, columns), expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("quantile", [0.0, 0.3, 0.9, 0.999])
@pytest.mark.parametrize("shape", [(3, 5), (1, 2), (40, 30)], ids=str)
def test_cut_equals_numpy_quantile(shape, quantile):
    n = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    stage = robust_orthogonalize(quantile=quantile)
    h = stage.coefficients(1, stage.options) | {"kind": stage.kind(n, stage.options)}
    t = np.quantile(n.abs().numpy(), quantile)
    np.testing.assert_allclose(stage.prepared(n, h).numpy(), np.clip(n.numpy(), -t, t), rtol=1e-12)


def _sampled(shape, *, falls):
    """Singular values of a Gaussian matrix of norm 1, or of one whose spectrum falls."""
    sigma = np.linalg.svd(np.random.default_rng(0).standard_normal(shape), compute_uv=False)
    if falls:
        sigma = sigma / np.sqrt(np.arange(1, len(sigma) + 1))
    return sigma / np.linalg.norm(sigma)


def _error(sigma, triple):
    a, b, c = triple
    for _ in range(5):
        sigma = a * sigma + b * sigma**3 + c * sigma**5
    return np.linalg.norm(1 - sigma**2)


@pytest.mark.parametrize("falls", [False, True], ids=["random", "falling"])
@pytest.mark.parametrize("shape", [(64, 64), (64, 256), (128, 512), (96, 16), (256, 256), (8, 8)], ids=str)
def test_coefficients_beat_muons_on_sampled_matrices(shape, falls):
    sigma = _sampled(shape, falls=falls)
    assert _error(sigma, newton_coefficients(*shape)) < _error(sigma, (3.4445, -4.7750, 2.0315))


@pytest.mark.parametrize("shape", [(1, 1), (3, 1000), (64, 64), (2048, 2048), (4096, 11008)], ids=str)
def test_coefficients_bound_every_singular_value(shape):
    sigma = np.linspace(0, 1, 5000)
    a, b, c = newton_coefficients(*shape)
    assert newton_coefficients(*shape[::-1]) == (a, b, c)
    for _ in range(5):
        sigma = a * sigma + b * sigma**3 + c * sigma**5
    assert sigma.max() < 1.26
    assert sigma[200:].min() > 0.49


def test_more_steps_are_more_exact():
    sigma = torch.randn(32, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    errors = []
    for steps in (2, 4, 6):
        p = nn.Parameter(torch.zeros(32, 64, dtype=torch.float64))
        p.grad = sigma
        Chain([p], [robust_orthogonalize(quantile=1.0, scale="none", ns_steps=steps)], lr=1.0).step()
        errors.append((p.detach() @ p.detach().T - torch.eye(32)).norm().item())
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.1 * errors[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantile": 1.1}, "quantile must be in"),
        ({"ns_steps": 0}, "ns_steps must be a whole number"),
        ({"momentum": -0.1}, "momentum must be in"),
    ],
    ids=str,
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        ROOT([nn.Parameter(torch.zeros(2, 2))], **options)
    with pytest.raises(UsageError, match="rows must be at least 1"):
        newton_coefficients(0, 3)
