"""Iterative RPO against NumPy, its limit, and what its likelihood term is for."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from trimtab.errors import UsageError
from trimtab.losses import dpo_loss, iterative_rpo_loss
from trimtab.testing import PreferenceLossTestCase


class TestIterativeRPO(PreferenceLossTestCase):
    loss = staticmethod(iterative_rpo_loss)
    lengths = ("chosen_lengths",)


@pytest.mark.parametrize("alpha", [0.2, 1.0])
def test_equals_numpy(alpha):
    generator = np.random.default_rng(0)
    values, tokens = generator.normal(-5, 2, (4, 7)), generator.integers(1, 9, 7)
    pw, pl, rw, rl = values
    expected = np.log1p(np.exp(-0.3 * ((pw - rw) - (pl - rl)))) - alpha * pw / tokens
    found = iterative_rpo_loss(
        *map(torch.tensor, values), chosen_lengths=torch.tensor(tokens), beta=0.3, alpha=alpha, reduction="none"
    )
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12)


def test_alpha_0_is_dpo():
    scores = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    tokens = torch.arange(1, 6)
    assert torch.equal(iterative_rpo_loss(*scores, chosen_lengths=tokens, alpha=0.0), dpo_loss(*scores))


def test_chosen_likelihood_needs_the_term():
    """A policy over three responses, whose chosen and rejected move together because their features are alike."""
    features = torch.tensor([[1.0, 0.0], [1.2, 0.3], [0.0, 0.0]], dtype=torch.float64)

    def train(alpha):
        weight = torch.tensor([1.0, 0.0], dtype=torch.float64, requires_grad=True)
        start = torch.log_softmax(features @ weight, 0).detach()
        for _ in range(200):
            policy = torch.log_softmax(features @ weight, 0)
            loss = iterative_rpo_loss(
                *(policy[:1], policy[1:2], start[:1], start[1:2]), chosen_lengths=torch.ones(1), beta=2.0, alpha=alpha
            )
            (gradient,) = torch.autograd.grad(loss, weight)
            weight = (weight - 0.3 * gradient).detach().requires_grad_()
        change = torch.log_softmax(features @ weight, 0).detach() - start
        return change.tolist()

    dpo, with_term = train(0.0), train(1.0)
    assert dpo[0] > dpo[1]
    assert with_term[0] > with_term[1]
    assert dpo[0] < -0.05
    assert with_term[0] > 0.05


def test_options_outside_their_range():
    with pytest.raises(UsageError, match="alpha must be at least 0"):
        iterative_rpo_loss(*torch.zeros(4, 2), chosen_lengths=torch.ones(2), alpha=-1)
