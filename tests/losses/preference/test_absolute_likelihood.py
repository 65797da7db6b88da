"""ASFT in the paper's form of sigmoids against NumPy, its limit, and what it does to the chosen likelihood."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from trimtab.losses import asft_loss, dpo_loss
from trimtab.testing import PreferenceLossTestCase


class TestASFT(PreferenceLossTestCase):
    loss = staticmethod(asft_loss)
    scores = ("policy_chosen", "policy_rejected")
    lengths = ("chosen_lengths", "rejected_lengths")


@pytest.mark.parametrize("weight", [0.3, 1.0])
def test_equals_numpy(weight):
    generator = np.random.default_rng(0)
    pi_w, pi_l = -8 * generator.random((2, 9)) - 0.05
    long_w, long_l = generator.integers(1, 9, (2, 9))
    p_w, p_l = np.exp(pi_w / long_w), np.exp(pi_l / long_l)
    f_w, f_l = np.log(p_w / (1 - p_w)), np.log(p_l / (1 - p_l))
    align = -np.log(1 / (1 + np.exp(-f_w))) - np.log(1 / (1 + np.exp(f_l)))
    found = asft_loss(
        torch.tensor(pi_w),
        torch.tensor(pi_l),
        chosen_lengths=torch.tensor(long_w),
        rejected_lengths=torch.tensor(long_l),
        align_weight=weight,
        reduction="none",
    )
    np.testing.assert_allclose(found.numpy(), -np.log(p_w) + weight * align, rtol=1e-11)


def test_weight_0_is_plain_fine_tuning():
    scores, tokens = torch.tensor([-6.0, -2.0]), torch.tensor([3, 4])
    loss = asft_loss(scores, scores, chosen_lengths=tokens, rejected_lengths=tokens, align_weight=0.0)
    assert float(loss) == pytest.approx((2.0 + 0.5) / 2)


@pytest.mark.parametrize("score", [-1e-12, 0.0, -1e-30, -1e30])
def test_probabilities_close_to_1_and_0_are_finite(score):
    rejected, tokens = torch.tensor([score], dtype=torch.float64, requires_grad=True), torch.ones(1)
    loss = asft_loss(torch.zeros(1).double(), rejected, chosen_lengths=tokens, rejected_lengths=tokens)
    loss.backward()
    assert loss.isfinite()
    assert rejected.grad.isfinite().all()
    if score == -1e-12:
        assert float(loss.detach()) == pytest.approx(-np.log(1e-12), rel=1e-6)


def test_chosen_likelihood_rises():
    """Two responses that share features: DPO lowers both, ASFT raises the chosen one."""
    features = torch.tensor([[1.0, 0.0], [1.2, 0.3], [0.0, 0.0]], dtype=torch.float64)
    one = torch.ones(1)

    def train(loss_of):
        weight = torch.tensor([1.0, 0.0], dtype=torch.float64, requires_grad=True)
        start = torch.log_softmax(features @ weight, 0).detach()
        for _ in range(200):
            policy = torch.log_softmax(features @ weight, 0)
            (gradient,) = torch.autograd.grad(loss_of(policy, start), weight)
            weight = (weight - 0.3 * gradient).detach().requires_grad_()
        return float((torch.log_softmax(features @ weight, 0)[0] - start[0]).detach())

    dpo = train(lambda policy, start: dpo_loss(policy[:1], policy[1:2], start[:1], start[1:2], beta=2.0))
    asft = train(lambda policy, _: asft_loss(policy[:1], policy[1:2], chosen_lengths=one, rejected_lengths=one))
    assert dpo < -0.05
    assert asft > 0.05
