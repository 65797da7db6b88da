"""AdamWScale against the rule of nanoT5's code, and the size of a step."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from trimtab.errors import UsageError
from trimtab.optim import AdamWScale, Chain, weight_rms_scale
from trimtab.testing import OptimizerTestCase


class TestAdamWScale(OptimizerTestCase):
    lr = 0.03
    elementwise = False

    def optimizer(self, params, **options):
        return AdamWScale(params, **{"lr": self.lr, "weight_decay": 0.01, **options})


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e4])
def test_a_step_is_relative_to_the_weights(size):
    p = nn.Parameter(torch.tensor([3.0, -4.0], dtype=torch.float64) * size)
    before = p.detach().clone()
    p.grad = torch.tensor([5.0, -5.0], dtype=torch.float64)
    AdamWScale([p], lr=0.01).step()
    # A first step of Adam has entries of size 1; the weights' root mean square is size sqrt(12.5), or the floor.
    moved = (p.detach() - before).abs()
    torch.testing.assert_close(
        moved, torch.full_like(moved, 0.01 * max(1e-3, size * math.sqrt(12.5))), rtol=1e-4, atol=0
    )


def _authors(streams, *, lr, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.0):
    """The step of nanoT5's copied_utils.py, in numpy."""
    beta1, beta2 = betas
    values = [x.numpy().copy() for x in streams.start()]
    ms, vs = ([np.zeros_like(x) for x in values] for _ in range(2))
    path = []
    for t, step in enumerate(streams.gradients(), start=1):
        for index, g in enumerate(step):
            g = g.numpy()
            ms[index] = beta1 * ms[index] + (1 - beta1) * g
            vs[index] = beta2 * vs[index] + (1 - beta2) * g**2
            size = lr * math.sqrt(1 - beta2**t) / (1 - beta1**t)
            size *= max(1e-3, math.sqrt((values[index] ** 2).mean()))
            values[index] = values[index] - size * ms[index] / (np.sqrt(vs[index]) + eps)
            values[index] = values[index] - lr * weight_decay * values[index]
        path.append([torch.tensor(x) for x in values])
    return path


@pytest.mark.parametrize(
    "options",
    [
        {"lr": 0.02},
        {"lr": 1e-3, "weight_decay": 0.1},
        {"lr": 0.05, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.5},
    ],
    ids=str,
)
def test_equals_the_authors_rule(streams, options):
    ours = streams.run(lambda params: AdamWScale(params, **options))
    assert streams.deviation(ours, _authors(streams, **options)) < 1e-12


def test_the_scale_works_in_other_chains():
    p = nn.Parameter(torch.tensor([3.0, -4.0]))
    p.grad = torch.ones(2)
    Chain([p], [weight_rms_scale(scale_floor=10.0)], lr=0.1).step()
    assert p.tolist() == [2.0, -5.0]


def test_refuses_a_negative_floor():
    with pytest.raises(UsageError, match="scale_floor must be in"):
        AdamWScale([nn.Parameter(torch.ones(1))], lr=0.1, scale_floor=-1.0)
