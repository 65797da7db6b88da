"""MinorSFT against NumPy, its gradient, and its limit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from trimtab.errors import UsageError
from trimtab.losses import minor_sft_loss
from trimtab.testing import PreferenceLossTestCase


class TestMinorSFT(PreferenceLossTestCase):
    loss = staticmethod(minor_sft_loss)
    scores = ("policy", "ref")
    policy = 1

    def test_gradcheck(self):
        """The weight has no gradient, so that differences of the loss say nothing: the gradient is the weight."""
        policy = torch.tensor([-2.0, -5.0], dtype=torch.float64, requires_grad=True)
        minor_sft_loss(policy, torch.tensor([-3.0, -3.0]), beta=0.5, reduction="sum").backward()
        torch.testing.assert_close(policy.grad, -2 / (1 + torch.tensor([0.5, -1.0], dtype=torch.float64).exp()))


@pytest.mark.parametrize("beta", [0.05, 1.0])
def test_equals_numpy(beta):
    pi, ref = np.random.default_rng(0).normal(-5, 2, (2, 8))
    expected = -2 / (1 + np.exp(beta * (pi - ref))) * pi
    found = minor_sft_loss(torch.tensor(pi), torch.tensor(ref), beta=beta, reduction="none")
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12)


def test_gradient_is_that_of_the_chosen_response_in_dpo():
    generator = torch.Generator().manual_seed(0)
    pi, ref = torch.randn(2, 9, generator=generator, dtype=torch.float64)
    pi.requires_grad_()
    (found,) = torch.autograd.grad(minor_sft_loss(pi, ref, beta=0.3, reduction="sum"), pi)
    (expected,) = torch.autograd.grad(-2 / 0.3 * F.logsigmoid(0.3 * (pi - ref)).sum(), pi)
    torch.testing.assert_close(found, expected)


def test_beta_0_is_plain_fine_tuning():
    pi, ref = torch.randn(2, 9, generator=torch.Generator().manual_seed(0))
    assert torch.equal(minor_sft_loss(pi, ref, beta=0.0), -pi.mean())
    with pytest.raises(UsageError, match="beta must be at least 0"):
        minor_sft_loss(pi, ref, beta=-0.1)
