"""SimPO against NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from trimtab.losses import simpo_loss
from trimtab.testing import PreferenceLossTestCase


class TestSimPO(PreferenceLossTestCase):
    loss = staticmethod(simpo_loss)
    scores = ("policy_chosen", "policy_rejected")
    lengths = ("chosen_lengths", "rejected_lengths")


@pytest.mark.parametrize("gamma", [0.0, 1.5])
def test_equals_numpy(gamma):
    rng = np.random.default_rng(0)
    (pw, pl), (tw, tl) = rng.normal(-5, 2, (2, 7)), rng.integers(1, 9, (2, 7))
    expected = np.log1p(np.exp(-(2.5 * pw / tw - 2.5 * pl / tl - gamma)))
    tokens = {"chosen_lengths": torch.tensor(tw), "rejected_lengths": torch.tensor(tl)}
    found = simpo_loss(torch.tensor(pw), torch.tensor(pl), **tokens, beta=2.5, gamma=gamma, reduction="none")
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12)


def test_repeating_a_response_changes_nothing():
    scores, tokens = torch.tensor([-4.0, -6.0]), torch.tensor([2, 3])
    once = simpo_loss(scores, scores - 1, chosen_lengths=tokens, rejected_lengths=tokens)
    twice = simpo_loss(2 * scores, 2 * (scores - 1), chosen_lengths=2 * tokens, rejected_lengths=2 * tokens)
    torch.testing.assert_close(once, twice)
