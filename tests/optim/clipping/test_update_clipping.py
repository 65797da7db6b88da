"""StableAdamW against the paper's algorithm in plain loops and pytorch_optimizer's; Adafactor's clipping."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from trimtab.optim import Chain, StableAdamW, adam, stable_adam, update_clip
from trimtab.testing import OptimizerTestCase

SHAPES = [(4, 3), (5,), (3, 2, 2, 2), ()]


class TestStableAdamW(OptimizerTestCase):
    elementwise = False

    def optimizer(self, params, **options):
        return StableAdamW(params, **{"lr": self.lr, **options})


class TestUpdateClip(OptimizerTestCase):
    elementwise = False

    def optimizer(self, params, **options):
        return Chain(params, [adam(), update_clip(clip_threshold=0.5)], **{"lr": self.lr, **options})


def _parameters():
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, dtype=torch.float64, generator=generator)) for shape in SHAPES]


def _gradients(params, step):
    generator = torch.Generator().manual_seed(1000 + step)
    for p in params:
        p.grad = torch.randn(p.shape, dtype=p.dtype, generator=generator) * (1000 if step % 40 == 30 else 1)


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize(("betas", "decay", "d"), [((0.9, 0.99), 0.0, 1.0), ((0.5, 0.9), 0.2, 2.0)])
def test_equals_the_papers_loop(betas, decay, d, foreach):
    """Algorithm 2, with its debiased decay rates."""
    params = _parameters()
    optimizer = StableAdamW(params, lr=0.02, betas=betas, clip_threshold=d, weight_decay=decay, foreach=foreach)
    theta = [p.detach().numpy().copy() for p in params]
    v = [np.zeros_like(x) for x in theta]
    u = [np.zeros_like(x) for x in theta]
    short = 0
    for t in range(1, 121):
        _gradients(params, t)
        beta1, beta2 = (beta * (1 - beta ** (t - 1)) / (1 - beta**t) for beta in betas)
        for i, p in enumerate(params):
            g = p.grad.numpy()
            v[i] = beta1 * v[i] + (1 - beta1) * g
            u[i] = beta2 * u[i] + (1 - beta2) * g**2
            rms = math.sqrt(np.mean(g**2 / np.maximum(u[i], 1e-12)))
            eta = 0.02 / max(1.0, rms / d)
            short += rms > d
            theta[i] = theta[i] - eta * decay * theta[i] - eta * v[i] / (np.sqrt(u[i]) + 1e-6)
        optimizer.step()
    for p, expected in zip(params, theta, strict=True):
        np.testing.assert_allclose(p.detach().numpy(), expected, rtol=1e-9, atol=1e-10)
    assert 10 < short < 470


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_equals_pytorch_optimizer(decay):
    peers = pytest.importorskip("pytorch_optimizer")
    ours, theirs = _parameters(), _parameters()
    optimizer = StableAdamW(ours, lr=0.01, betas=(0.9, 0.99), eps=1e-8, weight_decay=decay)
    other = peers.StableAdamW(theirs, lr=0.01, betas=(0.9, 0.99), eps=1e-8, weight_decay=decay, foreach=False)
    for step in range(120):
        _gradients(ours, step)
        _gradients(theirs, step)
        optimizer.step()
        other.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-8, atol=1e-9)


def test_update_clip_bounds_the_root_mean_square():
    small, large = nn.Parameter(torch.zeros(2, 3)), nn.Parameter(torch.zeros(2, 3))
    small.grad, large.grad = torch.full((2, 3), 0.1), torch.full((2, 3), 40.0)
    Chain([small, large], [update_clip(clip_threshold=2.0)], lr=1.0).step()
    torch.testing.assert_close(-small.detach(), small.grad)
    torch.testing.assert_close(-large.detach(), torch.full((2, 3), 2.0))


def test_after_a_calm_the_step_is_shorter_than_adams():
    """The second moment lags behind a sudden gradient: Adam steps by far more than lr, StableAdamW does not."""
    moved = {}
    stages = {"stable": stable_adam(betas=(0.9, 0.99)), "adam": adam(betas=(0.9, 0.99))}
    for name, stage in stages.items():
        p = nn.Parameter(torch.zeros(10, dtype=torch.float64))
        optimizer = Chain([p], [stage], lr=0.1)
        for step in range(300):
            p.grad = torch.full_like(p, 100.0 if step == 299 else 1e-3 * (-1) ** step)
            before = p.detach().clone()
            optimizer.step()
        moved[name] = float((p.detach() - before).abs().max())
    # m_hat / sqrt(v_hat) = 0.1 / sqrt(0.01) = 1, and RMS = 1 / sqrt(0.01) = 10.
    assert moved["adam"] == pytest.approx(0.1, rel=0.05)
    assert moved["stable"] == pytest.approx(0.01, rel=0.05)
