"""SGD against torch's, and its closed forms."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from trimtab.errors import UsageError
from trimtab.optim import SGD, Chain, momentum
from trimtab.testing import OptimizerTestCase


class TestSGD(OptimizerTestCase):
    lr = 0.01

    def optimizer(self, params, **options):
        return SGD(params, **{"lr": self.lr, "momentum": 0.9, "dampening": 0.1, "weight_decay": 0.01, **options})


def test_one_step_is_gradient_descent():
    p = nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
    optimizer = SGD([p], lr=0.5, weight_decay=0.1)
    p.grad = torch.tensor([4.0, 2.0], dtype=torch.float64)
    optimizer.step()
    # p - 0.5 (g + 0.1 p)
    assert p.tolist() == pytest.approx([1 - 0.5 * 4.1, -2 - 0.5 * 1.8], abs=1e-15)
    assert set(optimizer.state[p]) == {"step"}


def test_momentum_of_a_constant_gradient_is_a_geometric_sum():
    p = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = Chain([p], [momentum(momentum=0.5)], lr=1.0)
    for _ in range(10):
        p.grad = torch.ones(1, dtype=torch.float64)
        optimizer.step()
    # b_t = 2 - 2^(1 - t), and their sum over 10 steps.
    assert p.tolist() == pytest.approx([-(20 - sum(2.0 ** (1 - t) for t in range(1, 11)))], abs=1e-13)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": 0.9},
        {"momentum": 0.9, "nesterov": True, "weight_decay": 0.05},
        {"momentum": 0.7, "dampening": 0.4, "weight_decay": 0.01},
        {"momentum": 0.9, "maximize": True},
    ],
    ids=str,
)
def test_equals_torch(streams, options):
    ours = streams.run(lambda params: SGD(params, lr=0.01, **options))
    theirs = streams.run(lambda params: torch.optim.SGD(params, lr=0.01, foreach=False, **options))
    assert streams.deviation(ours, theirs) < 1e-13


def test_groups_may_leave_out_decay_and_momentum():
    p, q = (nn.Parameter(torch.ones(1, dtype=torch.float64)) for _ in range(2))
    optimizer = SGD([{"params": [p], "weight_decay": 0.0, "momentum": 0.0}, {"params": [q]}], 0.1, weight_decay=1.0)
    for value in (p, q):
        value.grad = torch.zeros(1, dtype=torch.float64)
    optimizer.step()
    assert (p.tolist(), q.tolist()) == ([1.0], [0.9])


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"momentum": 1.0}, "momentum must be in"),
        ({"dampening": 2.0}, "dampening must be in"),
        ({"nesterov": True}, "nesterov needs momentum above 0"),
        ({"nesterov": True, "momentum": 0.9, "dampening": 0.5}, "dampening 0, got 0.9 and 0.5"),
    ],
)
def test_refuses(options, text):
    with pytest.raises(UsageError, match=text):
        SGD([nn.Parameter(torch.ones(1))], lr=0.1, **options)


def test_momentum_cannot_be_added_later():
    p = nn.Parameter(torch.ones(1))
    optimizer = SGD([p], lr=0.1)
    p.grad = torch.ones(1)
    optimizer.step()
    optimizer.param_groups[0]["momentum"] = 0.9
    with pytest.raises(UsageError, match="build a new optimizer"):
        optimizer.step()
