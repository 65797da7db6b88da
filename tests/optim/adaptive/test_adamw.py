"""AdamW against torch's, and Adam's first step."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from trimtab.errors import UsageError
from trimtab.optim import AdamW
from trimtab.testing import OptimizerTestCase

_SETTINGS = [
    {"lr": 1e-3},
    {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-4, "weight_decay": 0.3},
    {"lr": 3e-2, "betas": (0.0, 0.9), "weight_decay": 0.0},
]


class TestAdamW(OptimizerTestCase):
    def optimizer(self, params, **options):
        return AdamW(params, **{"lr": self.lr, **options})


def test_first_step_is_closed_form():
    # m_hat = g and v_hat = g^2 at the first step, whatever the betas: p (1 - lr wd) - lr g / (|g| + eps).
    p = nn.Parameter(torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64))
    before = p.detach().clone()
    p.grad = torch.tensor([0.5, -4.0, 0.0], dtype=torch.float64)
    AdamW([p], lr=0.25, betas=(0.7, 0.9), eps=0.5, weight_decay=0.4).step()
    torch.testing.assert_close(p.detach(), before * 0.9 - 0.25 * p.grad / (p.grad.abs() + 0.5), rtol=1e-14, atol=1e-14)


def test_a_constant_gradient_always_moves_by_the_learning_rate():
    p = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    optimizer = AdamW([p], lr=0.1, eps=0.0, weight_decay=0.0)
    for _ in range(50):
        p.grad = torch.tensor([1e-3, -7.0], dtype=torch.float64)
        optimizer.step()
    assert p.tolist() == pytest.approx([-5.0, 5.0], abs=1e-12)


@pytest.mark.parametrize("options", _SETTINGS, ids=str)
def test_equals_torch(streams, options):
    ours = streams.run(lambda params: AdamW(params, **options))
    theirs = streams.run(lambda params: torch.optim.AdamW(params, foreach=False, **options))
    assert streams.deviation(ours, theirs) < 1e-12


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"betas": (0.9,)}, "betas must be 2 numbers"),
        ({"betas": (1.0, 0.9)}, "betas must be in"),
        ({"eps": -1e-8}, "eps must be in"),
        ({"weight_decay": -0.1}, "weight_decay must be in"),
    ],
)
def test_refuses(options, text):
    with pytest.raises(UsageError, match=text):
        AdamW([nn.Parameter(torch.ones(1))], lr=0.1, **options)
