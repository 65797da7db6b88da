"""Regularised preference optimisation against NumPy, its limit, and an arm that no pair covers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from trimtab.errors import UsageError
from trimtab.losses import dpo_loss, rpo_loss
from trimtab.testing import PreferenceLossTestCase


class TestRPO(PreferenceLossTestCase):
    loss = staticmethod(rpo_loss)


class TestRPOWithABaseline(PreferenceLossTestCase):
    @staticmethod
    def loss(policy_chosen, policy_rejected, policy_baseline, ref_chosen, ref_rejected, **options):
        scores = (policy_chosen, policy_rejected, ref_chosen, ref_rejected)
        return rpo_loss(*scores, policy_baseline=policy_baseline, **options)

    scores = ("policy_chosen", "policy_rejected", "policy_baseline", "ref_chosen", "ref_rejected")
    policy = 3
    lengths = ("baseline_lengths",)


@pytest.mark.parametrize("by_tokens", [False, True])
def test_equals_numpy(by_tokens):
    generator = np.random.default_rng(0)
    values, base, tokens = generator.normal(-5, 2, (4, 7)), generator.normal(-9, 2, 7), generator.integers(1, 9, 7)
    pw, pl, rw, rl = values
    expected = np.log1p(np.exp(-0.3 * ((pw - rw) - (pl - rl)))) - 0.7 * 0.3 * base / (tokens if by_tokens else 1)
    found = rpo_loss(
        *map(torch.tensor, values),
        policy_baseline=torch.tensor(base),
        baseline_lengths=torch.tensor(tokens) if by_tokens else None,
        beta=0.3,
        eta=0.7,
        reduction="none",
    )
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12)


def test_eta_0_is_dpo():
    scores = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(rpo_loss(*scores, eta=0.0), dpo_loss(*scores))


def test_unseen_arm_gets_mass_from_dpo_only():
    """Three arms with features; the pair covers two. DPO pushes both down, and the unseen bad arm takes their mass."""
    features = torch.tensor([[1.0, 0.0], [1.2, 0.3], [0.0, 0.0]], dtype=torch.float64)

    def unseen(eta):
        weight = torch.tensor([1.0, 0.0], dtype=torch.float64, requires_grad=True)
        start = torch.log_softmax(features @ weight, 0).detach()
        for _ in range(200):
            policy = torch.log_softmax(features @ weight, 0)
            loss = rpo_loss(policy[:1], policy[1:2], start[:1], start[1:2], beta=2.0, eta=eta)
            (gradient,) = torch.autograd.grad(loss, weight)
            weight = (weight - 0.3 * gradient).detach().requires_grad_()
        return float(torch.softmax(features @ weight, 0)[2].detach()), float(start.exp()[2])

    dpo, before = unseen(0.0)
    rpo, _ = unseen(0.5)
    assert dpo > 1.5 * before
    assert rpo < before


def test_options_outside_their_range():
    with pytest.raises(UsageError, match="eta must be at least 0"):
        rpo_loss(*torch.zeros(4, 2), eta=-1)
    with pytest.raises(UsageError, match="one shape"):
        rpo_loss(*torch.zeros(4, 2), policy_baseline=torch.zeros(3))
