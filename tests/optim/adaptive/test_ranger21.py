"""Ranger21 against plain loops with each addition on and off, the authors' code's faults, and pytorch_optimizer's."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from trimtab.errors import UsageError
from trimtab.optim import AdamW, Ranger21
from trimtab.testing import OptimizerTestCase

SHAPES = [(4, 3), (5,), (3, 2, 2, 2), (6, 2)]
OFF = {
    "warmup_steps": 0,
    "stable_decay": False,
    "agc": 0.0,
    "gradient_centralization": False,
    "positive_negative": False,
    "norm_loss": 0.0,
    "softplus": 0.0,
    "lookahead_steps": 0,
    "follow": "code",
}
"""Everything off: with follow="code", for AMSGrad's maximum is off too."""


class TestRanger21(OptimizerTestCase):
    lr = 0.03
    elementwise = False
    # Compiled, it is compared below: with and without lookahead, every shape compiles six kernels.
    paths = {"plain": {"foreach": False}, "foreach": {"foreach": True}}

    def optimizer(self, params, **options):
        return Ranger21(params, **{"lr": self.lr, "total_steps": 60, "warmup_steps": 2, **options})


def _parameters():
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, dtype=torch.float64, generator=generator)) for shape in SHAPES]


def _gradients(params, step):
    generator = torch.Generator().manual_seed(1000 + step)
    for p in params:
        p.grad = torch.randn(p.shape, dtype=p.dtype, generator=generator) * (1000 if step % 40 == 30 else 1)


def _units(x):
    return np.sqrt((x**2).sum(axis=tuple(range(1, x.ndim)) if x.ndim > 1 else None, keepdims=x.ndim > 1))


def _loop(params, steps, *, lr, total, options):
    """Ranger21 as the list of its parts, written for numpy arrays."""
    o = {
        "warmup_steps": 20,
        "stable_decay": True,
        "agc": 0.01,
        "gradient_centralization": True,
        "normalize": options.get("follow") == "code" and options.get("gradient_centralization", True),
        "positive_negative": True,
        "norm_loss": 1e-4,
        "softplus": 50.0 if options.get("follow") == "code" else 0.0,
        "lookahead_steps": 5,
        "weight_decay": 1e-4,
        "follow": "paper",
        **options,
    }
    beta1, beta2 = 0.9, 0.99
    code = o["follow"] == "code"
    w = [p.detach().numpy().copy() for p in params]
    slow = [x.copy() for x in w]
    m, m_before, v, v_max = ([np.zeros_like(x) for x in w] for _ in range(4))
    for t in range(1, steps + 1):
        _gradients(params, t)
        g = [p.grad.numpy().copy() for p in params]
        for i in range(len(w)):
            if o["agc"]:
                bound = o["agc"] * np.maximum(_units(w[i]), 1e-3)
                g[i] = g[i] * np.minimum(1, bound / np.maximum(_units(g[i]), 1e-6))
            if o["gradient_centralization"] and g[i].ndim > 1:
                g[i] = g[i] - g[i].mean(axis=tuple(range(1, g[i].ndim)), keepdims=True)
            if o["normalize"]:
                g[i] = g[i] / (g[i].std(ddof=1) + 1e-8)
            v[i] = beta2 * v[i] + (1 - beta2) * g[i] ** 2
            v_max[i] = v[i] if code else np.maximum(v_max[i], v[i])
        mean = sum((x / (1 - beta2**t)).sum() for x in v) / sum(x.size for x in v)
        eta = lr * (min(1, t / o["warmup_steps"]) if o["warmup_steps"] else 1)
        start = int(0.72 * total) if total else math.inf
        if t >= start:
            eta = max(3e-5, lr - (lr - 3e-5) * (t + 1 - start) / (total - start + 1))
        for i in range(len(w)):
            if not code or i == len(w) - 1:
                w[i] = w[i] * (1 - eta * o["weight_decay"] / (math.sqrt(mean) if o["stable_decay"] else 1))
                w[i] = w[i] * (1 - eta * 2 * o["norm_loss"] * (1 - 1 / (_units(w[i]) + 1e-8)))
            if o["positive_negative"]:
                m[i], m_before[i] = beta1**2 * m_before[i] + (1 - beta1**2) * g[i], m[i]
                b, n = (1, beta2) if code else (0.9, 0.9)
                m_hat = ((1 + b) * m[i] - b * m_before[i]) / math.sqrt((1 + n) ** 2 + n**2)
            else:
                m[i] = beta1 * m[i] + (1 - beta1) * g[i]
                m_hat = m[i]
            d = np.sqrt(v_max[i] / (1 - beta2**t)) + 1e-8
            if o["softplus"]:
                d = np.logaddexp(0, o["softplus"] * d) / o["softplus"]
            w[i] = w[i] - eta * m_hat / (1 - beta1**t) / d
            if o["lookahead_steps"] and t % o["lookahead_steps"] == 0:
                w[i] = 0.5 * w[i] + 0.5 * slow[i]
                slow[i] = w[i].copy()
    return w


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"normalize": True, "softplus": 50.0, "weight_decay": 0.1},
        {"follow": "code", "weight_decay": 0.1, "norm_loss": 0.1},
        *({name: OFF[name]} for name in OFF if name != "follow"),
        {**OFF, "weight_decay": 0.1, "stable_decay": True},
        {**OFF, "weight_decay": 0.1, "norm_loss": 0.1},
        {**OFF, "positive_negative": True, "follow": "paper"},
        {**OFF, "agc": 0.02},
        {**OFF, "gradient_centralization": True},
        {**OFF, "softplus": 20.0},
        {**OFF, "lookahead_steps": 3},
    ],
)
def test_equals_a_plain_loop(options):
    params = _parameters()
    chosen = {"warmup_steps": 20, **options}
    optimizer = Ranger21(params, lr=0.02, total_steps=120, betas=(0.9, 0.99), **chosen)
    expected = _loop(_parameters(), 120, lr=0.02, total=120, options=chosen)
    for t in range(1, 121):
        _gradients(params, t)
        optimizer.step()
    for p, w in zip(params, expected, strict=True):
        np.testing.assert_allclose(p.detach().numpy(), w, rtol=1e-8, atol=1e-9)


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
def test_compiled_agrees():
    ours, theirs = ([_parameters()[0], nn.Parameter(_parameters()[2].detach()[:, :, 0])] for _ in range(2))
    options = {"lr": 0.02, "total_steps": 20, "warmup_steps": 2, "weight_decay": 0.1, "norm_loss": 0.1}
    optimizer, other = Ranger21(ours, compile=True, **options), Ranger21(theirs, foreach=False, **options)
    for step in range(6):
        _gradients(ours, step)
        _gradients(theirs, step)
        optimizer.step()
        other.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-10)


def test_without_its_additions_it_is_adamw():
    ours, theirs = _parameters(), _parameters()
    # In follow="code" only a group's last parameter decays: a group each.
    groups = [{"params": [p]} for p in ours]
    optimizer = Ranger21(groups, lr=0.01, weight_decay=0.1, **OFF)
    other = AdamW(theirs, lr=0.01, weight_decay=0.1)
    for step in range(40):
        _gradients(ours, step)
        _gradients(theirs, step)
        optimizer.step()
        other.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("softplus", [True, False])
def test_equals_pytorch_optimizer(normalize, softplus):
    """Without decay: the peer adds 1 to the sum of second moments that stable weight decay divides by."""
    peers = pytest.importorskip("pytorch_optimizer")
    ours, theirs = _parameters(), _parameters()
    optimizer = Ranger21(
        ours, lr=0.01, total_steps=150, weight_decay=0.0, normalize=normalize, softplus=50.0 if softplus else 0.0
    )
    other = peers.Ranger21(
        theirs,
        num_iterations=150,
        lr=0.01,
        weight_decay=0.0,
        normalize_gradients=normalize,
        use_softplus=softplus,
        foreach=False,
    )
    for step in range(150):
        _gradients(ours, step)
        _gradients(theirs, step)
        optimizer.step()
        other.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)


def test_the_schedule():
    p = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = Ranger21(
        [p], lr=0.1, total_steps=100, betas=(0.9, 0.95), weight_decay=0.0, **{**OFF, "warmup_steps": None}
    )
    moves = []
    for _ in range(100):
        p.grad = torch.ones_like(p)
        before = p.item()
        optimizer.step()
        moves.append(before - p.item())
    # 2 / (1 - beta2) = 40 steps of warm-up; warm-down from step 72.
    assert moves[0] == pytest.approx(0.1 / 40, rel=1e-6)
    assert moves[19] == pytest.approx(0.05, rel=1e-6)
    assert moves[50] == pytest.approx(0.1, rel=1e-6)
    assert moves[70] == pytest.approx(0.1, rel=1e-6)
    assert moves[71] == pytest.approx(0.1 - (0.1 - 3e-5) / 29, rel=1e-6)
    assert moves[99] == pytest.approx(3e-5, rel=1e-4)


def test_wrong_values_are_refused():
    p = nn.Parameter(torch.ones(2))
    with pytest.raises(UsageError, match=r"unknown source to follow 'papers'\. Did you mean 'paper'"):
        Ranger21([p], follow="papers")
    with pytest.raises(UsageError, match="normalize=True divides centralised gradients"):
        Ranger21([p], normalize=True, gradient_centralization=False)
    with pytest.raises(UsageError, match=r"softplus must be in \[0, inf\), got -1"):
        Ranger21([p], softplus=-1)
