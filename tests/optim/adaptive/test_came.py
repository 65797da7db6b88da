"""CAME against the paper's algorithm and the authors' package."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from trimtab.errors import UsageError
from trimtab.optim import CAME
from trimtab.testing import OptimizerTestCase

_SETTINGS = [
    {"lr": 2e-4},
    {"lr": 1e-2, "weight_decay": 0.1, "clip_threshold": 0.5},
    {"lr": 1e-3, "betas": (0.8, 0.95, 0.99), "eps": (1e-12, 1e-8), "weight_decay": 0.01},
]


class TestCAME(OptimizerTestCase):
    lr = 0.003
    elementwise = False

    def optimizer(self, params, **options):
        return CAME(params, **{"lr": self.lr, "weight_decay": 0.01, **options})


def _paper(streams, shape, *, lr, betas=(0.9, 0.999, 0.9999), eps=(1e-30, 1e-16), clip_threshold=1.0, weight_decay=0.0):
    """Algorithm 2 for one matrix, with the paper's row and column sums."""
    (beta1, beta2, beta3), (eps1, eps2) = betas, eps
    theta = streams.start((shape,))[0].numpy()
    n, m = shape
    r, c, m_t = np.zeros((n, 1)), np.zeros((1, m)), np.zeros(shape)
    big_r, big_c = np.zeros((n, 1)), np.zeros((1, m))
    path = []
    for (gradient,) in streams.gradients((shape,)):
        g = gradient.numpy()
        r = beta2 * r + (1 - beta2) * (g**2 + eps1).sum(1, keepdims=True)
        c = beta2 * c + (1 - beta2) * (g**2 + eps1).sum(0, keepdims=True)
        u = g / np.sqrt(r @ c / r.sum())
        u_hat = u / max(1, np.sqrt((u**2).mean()) / clip_threshold)
        m_t = beta1 * m_t + (1 - beta1) * u_hat
        instability = (u_hat - m_t) ** 2
        big_r = beta3 * big_r + (1 - beta3) * (instability + eps2).sum(1, keepdims=True)
        big_c = beta3 * big_c + (1 - beta3) * (instability + eps2).sum(0, keepdims=True)
        theta = (1 - lr * weight_decay) * theta - lr / np.sqrt(big_r @ big_c / big_r.sum()) * m_t
        path.append([torch.tensor(theta)])
    return path


@pytest.mark.parametrize("options", _SETTINGS, ids=str)
@pytest.mark.parametrize("shape", [(7, 5), (1, 9), (9, 1)], ids=str)
def test_equals_the_papers_loop(streams, shape, options):
    ours = streams.run(lambda params: CAME(params, **options), (shape,))
    assert streams.deviation(ours, _paper(streams, shape, **options), (shape,)) < 1e-11


@pytest.mark.parametrize("options", _SETTINGS, ids=str)
def test_equals_came_pytorch(streams, options):
    peer = pytest.importorskip("came_pytorch")
    shapes = ((7, 5), (6,), (2, 3, 4), (1, 3), (4, 3, 2, 2))  # theirs has no scalars
    ours = streams.run(lambda params: CAME(params, **options), shapes)

    def make(params):
        # Their state of factored moments is made in the default dtype's storage; float64 follows from type_as.
        return peer.CAME(params, **options)

    theirs = streams.run(lambda params: _without_gradients(make(params)), shapes)
    assert streams.deviation(ours, theirs, shapes) < 1e-11


def _without_gradients(optimizer):
    """Return an optimizer whose step does not record gradients: the authors' works on `.data` only."""
    optimizer.step = torch.no_grad()(optimizer.step)
    return optimizer


def test_a_rank_one_gradient_moves_all_entries_alike():
    # r c / <r> is then g^2 exactly, so that x = sign(g) / sqrt(1 - beta2) for any scales.
    rows, cols = torch.tensor([1.0, -3.0, 0.01]), torch.tensor([2.0, 500.0, -7.0, 0.1])
    p = nn.Parameter(torch.zeros(3, 4, dtype=torch.float64))
    p.grad = torch.outer(rows, cols).double()
    CAME([p], lr=1.0, betas=(0.9, 0.999, 0.99), clip_threshold=1e9).step()
    size = 1 / np.sqrt(0.001)
    expected = 0.1 * size / np.sqrt(0.01 * ((0.9 * size) ** 2 + 1e-16))
    torch.testing.assert_close(p.detach(), -expected * torch.sign(p.grad), rtol=1e-6, atol=0)


def test_the_update_before_averaging_is_clipped():
    p = nn.Parameter(torch.zeros(30, 20, dtype=torch.float64))
    optimizer = CAME([p], lr=0.1, betas=(0.0, 0.999, 0.9999), clip_threshold=0.25)
    for seed in range(5):
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        optimizer.step()
    assert float(optimizer.state[p]["exp_avg"].square().mean().sqrt()) <= 0.25 * (1 + 1e-12)


def test_memory_is_one_moment_and_vectors():
    p = nn.Parameter(torch.zeros(30, 20))
    optimizer = CAME([p], lr=0.1)
    p.grad = torch.ones(30, 20)
    optimizer.step()
    assert sum(x.numel() for x in optimizer.state[p].values() if isinstance(x, torch.Tensor)) == 600 + 2 * (30 + 20)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"betas": (0.9, 0.99)}, "betas must be 3 numbers"),
        ({"eps": 1e-8}, "eps must be 2 numbers"),
        ({"eps": (1e-8, -1.0)}, "eps must be in"),
        ({"clip_threshold": 0.0}, "clip_threshold must be in"),
    ],
)
def test_refuses(options, text):
    with pytest.raises(UsageError, match=text):
        CAME([nn.Parameter(torch.ones(1))], lr=0.1, **options)
