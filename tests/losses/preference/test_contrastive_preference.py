"""CPO against NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from trimtab.errors import UsageError
from trimtab.losses import cpo_loss, dpo_loss
from trimtab.testing import PreferenceLossTestCase


class TestCPO(PreferenceLossTestCase):
    loss = staticmethod(cpo_loss)
    scores = ("policy_chosen", "policy_rejected")


class TestCPOByTokens(TestCPO):
    lengths = ("chosen_lengths",)


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_equals_numpy(weight):
    rng = np.random.default_rng(0)
    (pw, pl), tokens = rng.normal(-5, 2, (2, 7)), rng.integers(1, 9, 7)
    preference = np.log1p(np.exp(-0.2 * (pw - pl)))
    arguments = torch.tensor(pw), torch.tensor(pl)
    found = cpo_loss(*arguments, beta=0.2, nll_weight=weight, reduction="none")
    np.testing.assert_allclose(found.numpy(), preference - weight * pw, rtol=1e-12)
    means = cpo_loss(*arguments, chosen_lengths=torch.tensor(tokens), beta=0.2, nll_weight=weight, reduction="none")
    np.testing.assert_allclose(means.numpy(), preference - weight * pw / tokens, rtol=1e-12)


def test_is_dpo_with_a_uniform_reference_when_likelihood_has_no_weight():
    scores = torch.tensor([-2.0, -7.0, -4.0], dtype=torch.float64)
    uniform = torch.full((3,), -3.0, dtype=torch.float64)
    torch.testing.assert_close(
        cpo_loss(scores, scores.flip(0), nll_weight=0.0), dpo_loss(scores, scores.flip(0), uniform, uniform)
    )


def test_responses_without_tokens_are_refused():
    with pytest.raises(UsageError, match="above 0 everywhere"):
        cpo_loss(torch.zeros(2), torch.zeros(2), chosen_lengths=torch.tensor([1, 0]))
