"""iLR-DPO against NumPy, its limit, and the policy that it must find: one that pays for length."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from trimtab.errors import UsageError
from trimtab.losses import dpo_loss, ilr_dpo_loss
from trimtab.testing import PreferenceLossTestCase


class TestILRDPO(PreferenceLossTestCase):
    loss = staticmethod(ilr_dpo_loss)
    lengths = ("chosen_lengths", "rejected_lengths")


def _pairs():
    generator = np.random.default_rng(0)
    return generator.normal(-5, 2, (4, 7)), generator.integers(1, 90, (2, 7))


@pytest.mark.parametrize("alpha", [0.0, 0.03])
def test_equals_numpy(alpha):
    values, (long_w, long_l) = _pairs()
    pw, pl, rw, rl = values
    h = 0.3 * ((pw - rw) - (pl - rl)) + alpha * (long_w - long_l)
    found = ilr_dpo_loss(
        *map(torch.tensor, values),
        chosen_lengths=torch.tensor(long_w),
        rejected_lengths=torch.tensor(long_l),
        beta=0.3,
        alpha=alpha,
        reduction="none",
    )
    np.testing.assert_allclose(found.numpy(), np.log1p(np.exp(-h)), rtol=1e-12)


def test_alpha_0_is_dpo():
    values, (long_w, long_l) = _pairs()
    scores = [torch.tensor(value) for value in values]
    tokens = {"chosen_lengths": torch.tensor(long_w), "rejected_lengths": torch.tensor(long_l)}
    assert torch.equal(ilr_dpo_loss(*scores, **tokens, alpha=0.0), dpo_loss(*scores))


def test_bandit_reaches_the_policy_that_pays_for_length():
    """With preferences from a Bradley-Terry reward r, the minimiser is ref exp((r - alpha |y|) / beta) / Z."""
    beta, alpha = 0.5, 0.02
    reward = torch.tensor([0.0, 0.4, -0.3, 0.8], dtype=torch.float64)
    tokens = torch.tensor([5, 60, 10, 30])
    reference = torch.log_softmax(torch.tensor([0.5, 0.0, 1.0, -1.0], dtype=torch.float64), 0)
    logits = reference.clone().requires_grad_()
    first, second = torch.cartesian_prod(torch.arange(4), torch.arange(4)).T
    weight = torch.sigmoid(reward[first] - reward[second])
    optimizer = torch.optim.LBFGS([logits], max_iter=200, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        policy = torch.log_softmax(logits, 0)
        each = ilr_dpo_loss(
            *(policy[first], policy[second], reference[first], reference[second]),
            chosen_lengths=tokens[first],
            rejected_lengths=tokens[second],
            beta=beta,
            alpha=alpha,
            reduction="none",
        )
        loss = (weight * each).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    expected = torch.softmax(reference + (reward - alpha * tokens) / beta, 0)
    torch.testing.assert_close(torch.softmax(logits.detach(), 0), expected, rtol=1e-5, atol=1e-7)


def test_options_outside_their_range():
    zero, tokens = torch.zeros(2), torch.ones(2)
    with pytest.raises(UsageError, match="alpha must be at least 0"):
        ilr_dpo_loss(zero, zero, zero, zero, chosen_lengths=tokens, rejected_lengths=tokens, alpha=-0.1)
    with pytest.raises(UsageError, match="rejected_lengths must be above 0"):
        ilr_dpo_loss(zero, zero, zero, zero, chosen_lengths=tokens, rejected_lengths=torch.zeros(2))
