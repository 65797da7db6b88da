"""Unlikelihood training against NumPy, and its limit."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from trimtab.losses import unlikelihood_loss


def _batch():
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(3, 4, 5, generator=generator, dtype=torch.float64)
    targets = torch.randint(5, (3, 4), generator=generator)
    targets[0, :2] = -100
    return logits, targets, torch.rand(3, 4, generator=generator) < 0.5


def test_equals_numpy():
    logits, targets, bad = _batch()
    p = np.exp(logits.numpy())
    p /= p.sum(-1, keepdims=True)
    chosen = np.take_along_axis(p, targets.clamp(min=0).numpy()[..., None], -1)[..., 0]
    expected = np.where(bad.numpy(), -0.7 * np.log(1 - chosen), -np.log(chosen)) * (targets.numpy() != -100)
    found = unlikelihood_loss(logits, targets, bad, alpha=0.7, reduction="none")
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12)
    mean = unlikelihood_loss(logits, targets, bad, alpha=0.7)
    np.testing.assert_allclose(float(mean), expected.sum() / 10, rtol=1e-12)


def test_without_bad_tokens_it_is_plain_training():
    logits, targets, bad = _batch()
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(unlikelihood_loss(logits, targets, torch.zeros_like(bad)), expected)


def test_a_certain_bad_token_is_finite():
    logits = torch.tensor([[[200.0, 0.0]]], requires_grad=True)
    loss = unlikelihood_loss(logits, torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1, dtype=torch.bool))
    loss.backward()
    assert loss.isfinite()
    assert logits.grad.isfinite().all()
