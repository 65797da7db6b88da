"""DPO against NumPy, its gradient at the reference, and the policy that it must find."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from trimtab.errors import UsageError
from trimtab.losses import dpo_loss
from trimtab.testing import PreferenceLossTestCase


class TestDPO(PreferenceLossTestCase):
    loss = staticmethod(dpo_loss)


@pytest.mark.parametrize("beta", [0.05, 0.5])
@pytest.mark.parametrize("noise", [0.0, 0.2])
def test_equals_numpy(beta, noise):
    values = np.random.default_rng(0).normal(-5, 2, (4, 7))
    pw, pl, rw, rl = values
    p = 1 / (1 + np.exp(-beta * ((pw - pl) - (rw - rl))))
    expected = -(1 - noise) * np.log(p) - noise * np.log(1 - p)
    found = dpo_loss(*map(torch.tensor, values), beta=beta, label_smoothing=noise, reduction="none")
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12)


def test_gradient_at_the_reference():
    """There sigmoid(0) = 1/2 weighs every pair alike: the gradient is -beta / 2 for the chosen and beta / 2 else."""
    scores = torch.tensor([-3.0, -5.0], dtype=torch.float64)
    chosen, rejected = scores.clone().requires_grad_(), (scores - 1).requires_grad_()
    dpo_loss(chosen, rejected, scores, scores - 1, beta=0.3, reduction="sum").backward()
    torch.testing.assert_close(chosen.grad, torch.full((2,), -0.15, dtype=torch.float64))
    torch.testing.assert_close(rejected.grad, torch.full((2,), 0.15, dtype=torch.float64))


def test_bandit_reaches_the_analytical_policy():
    """With preferences from a Bradley-Terry reward r, the minimiser is ref exp(r / beta) / Z."""
    beta = 0.5
    reward = torch.tensor([0.0, 0.4, -0.3, 0.8], dtype=torch.float64)
    reference = torch.log_softmax(torch.tensor([0.5, 0.0, 1.0, -1.0], dtype=torch.float64), 0)
    logits = reference.clone().requires_grad_()
    first, second = torch.cartesian_prod(torch.arange(4), torch.arange(4)).T
    weight = torch.sigmoid(reward[first] - reward[second])
    optimizer = torch.optim.LBFGS([logits], max_iter=200, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        policy = torch.log_softmax(logits, 0)
        each = dpo_loss(policy[first], policy[second], reference[first], reference[second], beta=beta, reduction="none")
        loss = (weight * each).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    expected = torch.softmax(reference + reward / beta, 0)
    torch.testing.assert_close(torch.softmax(logits.detach(), 0), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("options", [{"beta": 0}, {"beta": float("nan")}, {"label_smoothing": 0.6}, {"beta": True}])
def test_options_outside_their_range(options):
    with pytest.raises(UsageError, match="must be"):
        dpo_loss(*torch.zeros(4, 2), **options)
