"""Chains that run in several parts: what one part keeps is not touched by the others."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from trimtab.optim import Chain, adam, perp_grad


@pytest.mark.parametrize("form", ["fp32", "bf16", "8bit"])
def test_parts_leave_each_others_moments_alone(form):
    """Lists run the norms and the entry-wise rest apart; an 8-bit moment that is coded again each time would shrink."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(80, 80, generator=generator)
    ends = []
    for foreach in (False, True):
        p = nn.Parameter(start.clone())
        optimizer = Chain([p], [adam(), perp_grad()], lr=0.01, state=form, foreach=foreach)
        for step in range(20):
            p.grad = torch.randn(80, 80, generator=torch.Generator().manual_seed(step)) - 0.3
            optimizer.step()
        ends.append([p.detach(), *(value for value in optimizer.state[p].values() if isinstance(value, torch.Tensor))])
    for one, two in zip(*ends, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)
