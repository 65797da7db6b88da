"""Advantage-weighted training against NumPy, and its limit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from trimtab.losses import advantage_weighted_loss


def _batch():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 4, 5, generator=generator, dtype=torch.float64)
    targets = torch.randint(5, (3, 4), generator=generator)
    targets[0, :2] = -100
    return logits, targets, torch.randn(3, 4, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("by_token", [True, False])
def test_equals_numpy(by_token):
    logits, targets, advantages = _batch()
    given = advantages if by_token else advantages[:, 0]
    p = np.exp(logits.numpy())
    p /= p.sum(-1, keepdims=True)
    chosen = np.take_along_axis(p, targets.clamp(min=0).numpy()[..., None], -1)[..., 0]
    weights = np.minimum(np.exp((given if by_token else given[:, None]).numpy() / 0.5), 3.0)
    expected = -weights * np.log(chosen) * (targets.numpy() != -100)
    found = advantage_weighted_loss(logits, targets, given, beta=0.5, max_weight=3.0, reduction="none")
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12)
    mean = advantage_weighted_loss(logits, targets, given, beta=0.5, max_weight=3.0)
    np.testing.assert_allclose(float(mean), expected.sum() / 10, rtol=1e-12)


def test_advantage_0_is_plain_training():
    logits, targets, advantages = _batch()
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(advantage_weighted_loss(logits, targets, torch.zeros_like(advantages)), expected)


def test_advantages_get_no_gradient():
    logits, targets, advantages = _batch()
    advantages.requires_grad_()
    assert not advantage_weighted_loss(logits, targets, advantages).requires_grad
