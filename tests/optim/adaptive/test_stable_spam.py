"""Stable-SPAM against the paper's algorithm, the authors' rule and pytorch_optimizer."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from trimtab.errors import UsageError
from trimtab.optim import StableSPAM
from trimtab.testing import OptimizerTestCase

_SETTINGS = [
    {"lr": 1e-3},
    {"lr": 1e-2, "interval": 40, "weight_decay": 0.1},
    {"lr": 1e-2, "interval": 25, "gammas": (0.5, 0.99, 0.9), "betas": (0.8, 0.99), "eps": 1e-4},
]


class TestStableSPAM(OptimizerTestCase):
    elementwise = False

    def optimizer(self, params, **options):
        return StableSPAM(params, **{"lr": self.lr, "interval": 7, "weight_decay": 0.01, **options})


def test_a_first_step_is_adams_on_a_unit_gradient():
    # T_hat = max |g| clips nothing, and a_hat = sqrt(b_hat) = ||g||: g / ||g||, whose size only eps can see.
    p = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    p.grad = torch.tensor([300.0, -400.0], dtype=torch.float64)
    StableSPAM([p], lr=1.0, eps=0.1).step()
    unit = torch.tensor([0.6, -0.8], dtype=torch.float64) * (500 / 500.1)
    torch.testing.assert_close(p.detach(), -unit / (unit.abs() + 0.1), rtol=1e-12, atol=0)


def _oracle(
    streams,
    *,
    code,
    lr,
    betas=(0.9, 0.999),
    eps=1e-8,
    gammas=(0.7, 0.9, 0.999),
    interval=1000,
    weight_decay=0.0,
):
    """AdaClip, AdaGN and MoRet in numpy; with `code`, what the authors' class computes, late reset included."""
    (beta1, beta2), (gamma1, gamma2, gamma3) = betas, gammas
    values = [x.numpy().copy() for x in streams.start()]
    ms, vs = ([np.zeros_like(x) for x in values] for _ in range(2))
    norms, squares, maxima, path = [0.0] * len(values), [0.0] * len(values), [0.0] * len(values), []
    counts, ages = [0] * len(values), [0] * len(values)
    for t, step in enumerate(streams.gradients(), start=1):
        for i, g in enumerate(step):
            g = g.numpy().copy()
            values[i] = values[i] * (1 - lr * weight_decay)
            counts[i] += 1
            n = counts[i] if code else t
            top = np.abs(g).max()
            maxima[i] = gamma3 * maxima[i] + (1 - gamma3) * top
            bound = maxima[i] / (1 - gamma3**n)
            g = np.where(np.abs(g) > bound, g / top * bound, g)
            norm = math.sqrt((g**2).sum())
            norms[i] = gamma1 * norms[i] + (1 - gamma1) * norm
            squares[i] = gamma2 * squares[i] + (1 - gamma2) * norm**2
            g = g / norm * (norms[i] / (1 - gamma1**n)) / (math.sqrt(squares[i] / (1 - gamma2**n)) + eps)
            forget = False
            if t % interval == 0:
                counts[i], ages[i] = 1, 0
                forget = code
                if not code:
                    ms[i], vs[i] = np.zeros_like(g), np.zeros_like(g)
            ages[i] += 1
            ms[i] = beta1 * ms[i] + (1 - beta1) * g
            vs[i] = beta2 * vs[i] + (1 - beta2) * g**2
            denominator = np.sqrt(vs[i]) / math.sqrt(1 - beta2 ** ages[i]) + eps
            values[i] = values[i] - lr / (1 - beta1 ** ages[i]) * ms[i] / denominator
            if forget:
                ms[i], vs[i] = np.zeros_like(g), np.zeros_like(g)
        path.append([torch.tensor(x) for x in values])
    return path


@pytest.mark.parametrize("options", _SETTINGS, ids=str)
def test_equals_the_papers_loop(streams, options):
    ours = streams.run(lambda params: StableSPAM(params, **options))
    assert streams.deviation(ours, _oracle(streams, code=False, **options)) < 1e-11


@pytest.mark.parametrize("options", _SETTINGS, ids=str)
def test_equals_the_authors_rule(streams, options):
    ours = streams.run(lambda params: StableSPAM(params, follow="code", **options))
    assert streams.deviation(ours, _oracle(streams, code=True, **options)) < 1e-11


@pytest.mark.parametrize("options", _SETTINGS, ids=str)
def test_equals_pytorch_optimizer(streams, options):
    peer = pytest.importorskip("pytorch_optimizer")
    names = {"interval": "update_proj_gap"}

    def theirs(params):
        given = {names.get(name, name): value for name, value in options.items() if name != "gammas"}
        given |= dict(zip(("gamma1", "gamma2", "theta"), options.get("gammas", ()), strict=False))
        return peer.StableSPAM(params, **given)

    ours = streams.run(lambda params: StableSPAM(params, **options))
    assert streams.deviation(ours, streams.run(theirs)) < 1e-11


@pytest.mark.parametrize("size", [1e-8, 1e8])
def test_the_path_does_not_depend_on_the_gradients_unit(streams, size):
    # Everything but eps is relative to the gradients' own history.
    def scaled(params):
        optimizer = StableSPAM(params, lr=0.01, eps=1e-30)
        step = optimizer.step

        def wrapped():
            for p in params:
                p.grad = p.grad * size
            step()

        optimizer.step = wrapped
        return optimizer

    ours = streams.run(scaled)
    theirs = streams.run(lambda params: StableSPAM(params, lr=0.01, eps=1e-30))
    assert streams.deviation(ours, theirs) < 1e-9


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"gammas": (0.7, 0.9)}, "gammas must be 3 numbers"),
        ({"gammas": (0.7, 0.9, 1.0)}, "gammas must be in"),
        ({"interval": -1}, "interval must be a whole number"),
        ({"follow": "both"}, "unknown source"),
    ],
)
def test_refuses(options, text):
    with pytest.raises(UsageError, match=text):
        StableSPAM([nn.Parameter(torch.ones(1))], lr=0.1, **options)


def test_a_norm_whose_square_overflows_stays_out_of_the_weights():
    p = nn.Parameter(torch.ones(4))
    optimizer = StableSPAM([p], lr=0.01)
    for step in range(4):
        p.grad = torch.ones(4)
        p.grad[0] = 1e25 if step == 1 else 1.0
        optimizer.step()
    assert (p - 1).abs().max() < 0.1
    assert all(value.isfinite().all() for value in (p, optimizer.state[p]["norm"], optimizer.state[p]["norm_sq"]))
