"""Clipping by the global norm against torch's, and its bound."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from trimtab.optim import Chain, adam, clip_by_global_norm
from trimtab.testing import OptimizerTestCase


class TestClipByGlobalNorm(OptimizerTestCase):
    def optimizer(self, params, **options):
        return Chain(params, [clip_by_global_norm(max_norm=0.1), adam()], **{"lr": self.lr, **options})


def _parameters():
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, dtype=torch.float64, generator=generator)) for shape in [(4, 3), (5,), ()]]


def _gradients(params, step):
    generator = torch.Generator().manual_seed(1000 + step)
    for p in params:
        p.grad = torch.randn(p.shape, dtype=p.dtype, generator=generator) * (1000 if step % 40 == 30 else 0.3)


@pytest.mark.parametrize("scale", [1e-3, 10.0])
def test_bounds_the_joint_norm(scale):
    params = [
        nn.Parameter(torch.zeros(3, 4, dtype=torch.float64)),
        nn.Parameter(torch.zeros(0)),
        nn.Parameter(torch.zeros(5)),
    ]
    for index, p in enumerate(params):
        p.grad = torch.full_like(p, scale * (index + 1))
    norm = scale * (12 * 1 + 5 * 9) ** 0.5
    groups = [{"params": params[:1]}, {"params": params[1:], "max_norm": 1.0}]
    Chain(groups, [clip_by_global_norm(max_norm=2.0)], lr=1.0).step()
    torch.testing.assert_close(-params[0].detach(), params[0].grad * min(1.0, 2 / norm))
    torch.testing.assert_close(-params[2].detach(), params[2].grad * min(1.0, 1 / norm))


def test_equals_torch():
    ours, theirs = _parameters(), _parameters()
    optimizer = Chain(ours, [clip_by_global_norm(max_norm=0.5), adam()], lr=0.01, weight_decay=0.1)
    other = torch.optim.AdamW(theirs, lr=0.01, weight_decay=0.1)
    for step in range(120):
        _gradients(ours, step)
        _gradients(theirs, step)
        # torch adds 1e-6 to the norm.
        norm = torch.nn.utils.get_total_norm([p.grad for p in theirs])
        torch.nn.utils.clip_grads_with_norm_(theirs, 0.5, norm - 1e-6)
        optimizer.step()
        other.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-9)
