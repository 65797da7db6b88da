"""Muon against torch's, its equations in float64, and the polar factor from a singular value decomposition."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from trimtab.errors import UsageError
from trimtab.optim import Chain, Muon, orthogonalize, param_groups_for
from trimtab.optim.matrix._newton_schulz import SCHEDULES, newton_schulz
from trimtab.testing import OptimizerTestCase


class TestMuon(OptimizerTestCase):
    lr = 0.02
    elementwise = False

    def optimizer(self, params, **options):
        return Muon(params, **{"lr": self.lr, "other_lr": 0.5, **options})


def _stream(shape, steps=130, dtype=torch.float64):
    """Gradients of changing size and rank, with spikes."""
    generator = torch.Generator().manual_seed(7)
    base = torch.randn(shape, generator=generator, dtype=torch.float64)
    for step in range(steps):
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        scale = 1000 if step in (20, 77) else 0.01 if step % 11 == 3 else 1
        yield (scale * (base + noise)).to(dtype)


def _run(optimizer, p, shape, **stream):
    for grad in _stream(shape, **stream):
        p.grad = grad
        optimizer.step()
    return p.detach()


def _reference(shape, *, lr, mu, nesterov, decay, scale, schedule, p):
    """The author's equations in numpy: momentum as a sum, and Newton-Schulz on whichever side."""
    p, total = p.numpy().copy(), np.zeros(shape)
    for grad in _stream(shape):
        g = grad.numpy()
        total = mu * total + g
        n = g + mu * total if nesterov else total
        X = n.reshape(shape[0], -1)
        X = X / np.linalg.norm(X)
        for a, b, c in schedule:
            G = X.T @ X
            X = a * X + b * X @ G + c * X @ G @ G
        p = p * (1 - lr * decay) - lr * scale * X.reshape(shape)
    return p


@pytest.mark.parametrize("shape", [(6, 4), (4, 9), (5, 5), (1, 3), (3, 1), (4, 2, 3, 3)], ids=str)
@pytest.mark.parametrize(
    ("options", "scale"),
    [
        ({"scale": "original"}, lambda r, c: max(1, r / c) ** 0.5),
        ({"scale": "match_rms_adamw", "nesterov": False, "weight_decay": 0.1}, lambda r, c: 0.2 * max(r, c) ** 0.5),
        ({"scale": "spectral", "momentum": 0.8, "weight_decay": 0.3}, lambda r, c: (r / c) ** 0.5),
        ({"scale": "none", "coefficients": "you", "momentum": 0.0}, lambda r, c: 1.0),
    ],
    ids=["original", "rms", "spectral", "none"],
)
def test_equals_the_equations(shape, options, scale):
    start = torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    p = nn.Parameter(start.clone())
    result = _run(Muon([p], lr=0.05, ns_eps=1e-30, **options), p, shape)
    expected = _reference(
        shape,
        p=start,
        lr=0.05,
        mu=options.get("momentum", 0.95),
        nesterov=options.get("nesterov", True),
        decay=options.get("weight_decay", 0.0),
        scale=scale(shape[0], int(np.prod(shape[1:]))),
        schedule=SCHEDULES[options.get("coefficients", "jordan")],
    )
    np.testing.assert_allclose(result.numpy(), expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("shape", [(16, 8), (8, 16), (12, 12)], ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"scale": "match_rms_adamw", "nesterov": False, "momentum": 0.8}], ids=["a", "b"]
)
def test_equals_torch_in_bf16(shape, options):
    """Both run Newton-Schulz in bf16, by the same products: bit for bit, but for the sum of the norm."""
    start = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    names = {"scale": "adjust_lr_fn"}
    p, q = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    peer = torch.optim.Muon([q], lr=0.05, weight_decay=0.1, **{names.get(k, k): v for k, v in options.items()})
    ours = Muon([p], lr=0.05, weight_decay=0.1, precision="bf16", **options)
    mine = _run(ours, p, shape, dtype=torch.float32)
    theirs = _run(peer, q, shape, dtype=torch.float32)
    assert (mine - theirs).norm() < 1e-6 * (theirs - start).norm()


def test_others_equal_torch_adamw():
    start = torch.randn(5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    table = torch.randn(7, 3, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    ours = [nn.Parameter(start.clone()), nn.Parameter(table.clone())]
    peers = [nn.Parameter(start.clone()), nn.Parameter(table.clone())]
    groups = [{"params": ours[:1], "role": "vector"}, {"params": ours[1:], "role": "embedding", "weight_decay": 0.4}]
    optimizer = Muon(groups, lr=0.1, other_lr=0.2, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0)
    reference = torch.optim.AdamW(
        [{"params": peers[:1], "weight_decay": 0.0}, {"params": peers[1:], "weight_decay": 0.4}],
        lr=0.02,
        betas=(0.9, 0.99),
        eps=1e-8,
    )
    for one, two in zip(_stream((5,)), _stream((7, 3)), strict=True):
        for params in (ours, peers):
            params[0].grad, params[1].grad = one, two
        optimizer.step()
        reference.step()
    for p, q in zip(ours, peers, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", SCHEDULES)
def test_named_coefficients_raise_every_singular_value(name):
    """After its steps, a set sends [0.05, 1] near 1, and no value of [0, 1] above 1.25."""
    sigma = torch.linspace(0, 1, 2001, dtype=torch.float64)
    for a, b, c in SCHEDULES[name]:
        sigma = a * sigma + b * sigma**3 + c * sigma**5
    assert sigma.max() < 1.25
    steep = name not in ("classical-cubic", "classical-quintic", "two-step")
    assert sigma[100:].min() > (0.65 if steep else 0.25)


@pytest.mark.parametrize("shape", [(7, 4), (4, 7), (6, 6)], ids=str)
def test_converging_coefficients_give_the_polar_factor(shape):
    G = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    U, _, Vh = torch.linalg.svd(G, full_matrices=False)
    for name in ("classical-cubic", "classical-quintic", "two-step", "polar-express-8"):
        schedule = SCHEDULES[name] * (8 if name.startswith(("classical", "two")) else 1)
        torch.testing.assert_close(newton_schulz(G, schedule), U @ Vh, rtol=0, atol=1e-4)


def test_does_not_depend_on_the_gradients_size():
    results = []
    for factor in (1.0, 1e4):
        p = nn.Parameter(torch.zeros(4, 3, dtype=torch.float64))
        optimizer = Muon([p])
        for grad in _stream((4, 3), steps=5):
            p.grad = grad * factor
            optimizer.step()
        results.append(p.detach())
    torch.testing.assert_close(results[0], results[1])


def test_roles_choose_the_treatment():
    model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 4), nn.Linear(4, 10))
    optimizer = Muon(param_groups_for(model), lr=0.02)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    names = {name: set(optimizer.state[p]) for name, p in model.named_parameters()}
    assert "momentum_buffer" in names["1.weight"]
    assert all("exp_avg_sq" in names[name] for name in ("0.weight", "1.bias", "2.weight", "2.bias"))


def test_a_batch_of_small_matrices_is_each_of_them():
    grads = [torch.randn(6, 4, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i in range(3)]
    together = [nn.Parameter(torch.zeros(6, 4, dtype=torch.float64)) for _ in grads]
    for p, grad in zip(together, grads, strict=True):
        p.grad = grad
    Chain(together, [orthogonalize()], lr=1.0).step()
    for p, grad in zip(together, grads, strict=True):
        alone = nn.Parameter(torch.zeros(6, 4, dtype=torch.float64))
        alone.grad = grad
        Chain([alone], [orthogonalize()], lr=1.0).step()
        torch.testing.assert_close(p, alone)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"momentum": 1.0}, "momentum must be in"),
        ({"coefficients": "jordon"}, "Did you mean 'jordan'"),
        ({"coefficients": [(1.0, 2.0)]}, "triples"),
        ({"coefficients": []}, "at least one step"),
        ({"scale": "rms"}, "unknown scale"),
        ({"precision": "fp8"}, "unknown precision"),
        ({"nesterov": 1}, "nesterov must be True or False"),
        ({"other_lr": -1.0}, "other_lr must be in"),
        ({"ns_eps": 0.0}, "ns_eps must be in"),
    ],
    ids=str,
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        Muon([nn.Parameter(torch.zeros(2, 2))], **options)


def test_autocast_changes_nothing():
    results = []
    for enabled in (False, True):
        p = nn.Parameter(torch.eye(4, 6))
        p.grad = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            Muon([p], lr=0.1).step()
        results.append(p.detach())
    assert torch.equal(*results)
