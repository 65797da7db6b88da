"""Lion against its pseudo-code and lion-pytorch."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from trimtab.errors import UsageError
from trimtab.optim import AdamW, Lion
from trimtab.testing import OptimizerTestCase

_SETTINGS = [
    {"lr": 1e-4},
    {"lr": 3e-3, "betas": (0.95, 0.98), "weight_decay": 0.3},
    {"lr": 1e-2, "betas": (0.0, 0.5), "weight_decay": 1.0},
]


class TestLion(OptimizerTestCase):
    lr = 0.003

    def optimizer(self, params, **options):
        return Lion(params, **{"lr": self.lr, "weight_decay": 0.1, **options})


def test_every_entry_moves_by_the_learning_rate(streams):
    path = streams.run(lambda params: Lion(params, lr=0.25), steps=20)
    for before, after in itertools.pairwise(path):
        for x, y in zip(before, after, strict=True):
            torch.testing.assert_close((y - x).abs(), torch.full_like(x, 0.25), rtol=0, atol=1e-13)


def _paper(streams, *, lr, betas=(0.9, 0.99), weight_decay=0.0):
    """Algorithm 2, entry by entry in Python's floats."""
    beta1, beta2 = betas
    values = [x.numpy().ravel().copy() for x in streams.start()]
    moments = [np.zeros_like(x) for x in values]
    path = []
    for step in streams.gradients():
        for theta, m, gradient in zip(values, moments, step, strict=True):
            for i, g in enumerate(gradient.ravel().tolist()):
                c = beta1 * m[i] + (1 - beta1) * g
                theta[i] -= lr * ((c > 0) * 1.0 - (c < 0) * 1.0 + weight_decay * theta[i])
                m[i] = beta2 * m[i] + (1 - beta2) * g
        path.append([torch.tensor(x).reshape(shape).clone() for x, shape in zip(values, streams.shapes, strict=True)])
    return path


@pytest.mark.parametrize("options", _SETTINGS, ids=str)
def test_equals_the_papers_loop(streams, options):
    assert streams.deviation(streams.run(lambda params: Lion(params, **options)), _paper(streams, **options)) < 1e-12


@pytest.mark.parametrize("options", _SETTINGS, ids=str)
def test_equals_lion_pytorch(streams, options):
    peer = pytest.importorskip("lion_pytorch")
    ours = streams.run(lambda params: Lion(params, **options))
    theirs = streams.run(lambda params: peer.Lion(params, **options))
    assert streams.deviation(ours, theirs) < 1e-12


def test_a_zero_gradient_moves_nothing():
    p = nn.Parameter(torch.ones(3))
    optimizer = Lion([p], lr=0.1)
    p.grad = torch.zeros(3)
    optimizer.step()
    assert p.tolist() == [1.0, 1.0, 1.0]


def test_keeps_one_moment():
    sizes = []
    for make in (Lion, AdamW):
        p = nn.Parameter(torch.ones(8, 8))
        optimizer = make([p], lr=0.1)
        p.grad = torch.ones(8, 8)
        optimizer.step()
        sizes.append(sum(x.numel() for x in optimizer.state[p].values() if isinstance(x, torch.Tensor)))
    assert sizes == [64, 128]


def test_refuses_betas():
    with pytest.raises(UsageError, match="betas must be in"):
        Lion([nn.Parameter(torch.ones(1))], lr=0.1, betas=(0.9, 1.0))
