"""The cost of linear attention grows with the length, in the backward pass too."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from trimtab.layers import GatedDeltaNet, GatedLinearAttention


class _Written(TorchDispatchMode):
    """Count the elements of everything that operations return."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.total += sum(x.numel() for x in torch.utils._pytree.tree_leaves(out) if isinstance(x, torch.Tensor))
        return out


@pytest.mark.parametrize("kind", [GatedLinearAttention, GatedDeltaNet])
def test_work_is_linear_forward_and_backward(kind):
    """A slice by index in the loop over chunks would make its gradient as long as the sequence: 3 to 4 times here."""
    torch.manual_seed(0)
    layer = kind(32, 2, chunk=16)
    written = []
    for length in (1024, 2048):
        with _Written() as counted:
            layer(torch.ones(1, length, 32)).sum().backward()
        written.append(counted.total)
    assert 1.95 < written[1] / written[0] < 2.05
