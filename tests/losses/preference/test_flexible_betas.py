"""Flex-DPO against NumPy, its limit, and the fall of the rejected likelihood."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from trimtab.errors import UsageError
from trimtab.losses import dpo_loss, flex_dpo_loss
from trimtab.testing import PreferenceLossTestCase


class TestFlexDPO(PreferenceLossTestCase):
    loss = staticmethod(flex_dpo_loss)


@pytest.mark.parametrize("by_tokens", [False, True])
def test_equals_numpy(by_tokens):
    generator = np.random.default_rng(0)
    values, tokens = generator.normal(-5, 2, (4, 7)), generator.integers(1, 9, 7)
    pw, pl, rw, rl = values
    h = 0.4 * (pw - rw) - 0.1 * (pl - rl)
    expected = np.log1p(np.exp(-h)) - 0.6 * pw / (tokens if by_tokens else 1)
    found = flex_dpo_loss(
        *map(torch.tensor, values),
        chosen_lengths=torch.tensor(tokens) if by_tokens else None,
        beta_chosen=0.4,
        beta_rejected=0.1,
        sft_weight=0.6,
        reduction="none",
    )
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12)


def test_equal_betas_are_dpo():
    scores = torch.randn(4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = flex_dpo_loss(*scores, beta_chosen=0.3, beta_rejected=0.3)
    torch.testing.assert_close(found, dpo_loss(*scores, beta=0.3), rtol=1e-14, atol=0)


def test_rejected_falls_slower_at_an_equal_margin():
    """Tabular policy over four arms: trained to one margin, the rejected has fallen less, the chosen risen."""

    def train(beta_rejected, sft_weight=0.0):
        start = torch.log_softmax(torch.tensor([0.0, 0.0, 1.0, 1.0], dtype=torch.float64), 0)
        logits = start.clone().requires_grad_()
        for _ in range(5000):
            policy = torch.log_softmax(logits, 0)
            change = (policy - start).detach()
            if change[0] - change[1] > 4:
                return change[0].item(), change[1].item()
            loss = flex_dpo_loss(
                *(policy[:1], policy[1:2], start[:1], start[1:2]),
                beta_chosen=1.0,
                beta_rejected=beta_rejected,
                sft_weight=sft_weight,
            )
            (gradient,) = torch.autograd.grad(loss, logits)
            logits = (logits - 0.5 * gradient).detach().requires_grad_()
        raise AssertionError("the margin was not reached")

    (chosen, rejected), (flex_chosen, flex_rejected), (_, sft_rejected) = train(1.0), train(0.2), train(1.0, 0.5)
    assert flex_rejected > rejected + 0.3
    assert flex_chosen > chosen + 0.3
    assert sft_rejected > rejected + 0.2


def test_options_outside_their_range():
    with pytest.raises(UsageError, match="beta_chosen must be above 0"):
        flex_dpo_loss(*torch.zeros(4, 2), beta_chosen=0)
    with pytest.raises(UsageError, match="beta_rejected must be at least 0"):
        flex_dpo_loss(*torch.zeros(4, 2), beta_rejected=-1)
