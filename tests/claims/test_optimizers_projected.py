"""What projected optimizers claim, on tasks small enough that the mechanism alone decides."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from trimtab.optim import FRUGAL, AdamW, Fira, GaLoreAdamW


def _matrix(rank):
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(24, rank, generator=generator), torch.randn(rank, 32, generator=generator)
    return left @ right / rank**0.5


def _fit(make, target, steps=400):
    """Return the part of |target|^2 left after descending |W - target|^2, and the numbers kept by the optimizer."""
    w = nn.Parameter(torch.zeros_like(target))
    optimizer = make([w])
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / steps)
        noise = torch.randn(target.shape, generator=torch.Generator().manual_seed(step))
        w.grad = w.detach() - target + 0.01 * noise
        optimizer.step()
    left = (w.detach() - target).square().sum() / target.square().sum()
    numbers = sum(x.numel() for x in optimizer.state[w].values() if isinstance(x, torch.Tensor))
    return float(left), numbers


def test_galore_keeps_up_with_adam_on_a_low_rank_task():
    target = _matrix(3)
    adam, whole = _fit(lambda params: AdamW(params, weight_decay=0.0), target)
    galore, part = _fit(lambda params: GaLoreAdamW(params, rank=6, scale=1.0, update_gap=50), target)
    assert max(adam, galore) < 1e-3
    assert part < 0.4 * whole


@pytest.mark.parametrize(
    "make",
    [
        lambda params: Fira(params, rank=6, scale=1.0, update_gap=10_000, gamma=1.1),
        lambda params: FRUGAL(params, projection="svd", density=0.25, update_gap=10_000),
    ],
    ids=["fira", "frugal"],
)
def test_full_rank_updates_reach_what_galore_misses(make):
    # With one subspace for the whole run, what lies outside of it stays where GaLore found it.
    target = _matrix(24)
    energies = torch.linalg.svdvals(target).square()
    outside = float(energies[6:].sum() / energies.sum())
    galore, _ = _fit(lambda params: GaLoreAdamW(params, rank=6, scale=1.0, update_gap=10_000), target)
    full, _ = _fit(make, target)
    assert outside > 0.2
    assert 0.99 * outside < galore < 1.1 * outside
    assert full < 0.01 * outside
