"""IPO against NumPy, and the margin at which it stops."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from trimtab.losses import dpo_loss, ipo_loss
from trimtab.testing import PreferenceLossTestCase


class TestIPO(PreferenceLossTestCase):
    loss = staticmethod(ipo_loss)


@pytest.mark.parametrize("tau", [0.05, 0.5])
def test_equals_numpy(tau):
    values = np.random.default_rng(0).normal(-5, 2, (4, 7))
    pw, pl, rw, rl = values
    expected = (np.log(np.exp(pw) * np.exp(rl) / (np.exp(pl) * np.exp(rw))) - 1 / (2 * tau)) ** 2
    found = ipo_loss(*map(torch.tensor, values), tau=tau, reduction="none")
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-9)


def test_deterministic_preferences_end_at_a_finite_margin():
    """Two responses, one always preferred: IPO stops at a log-ratio of 1 / (2 tau), DPO goes on."""
    reference = torch.log_softmax(torch.tensor([0.3, -0.2], dtype=torch.float64), 0)
    margins = {}
    for loss, options in ((ipo_loss, {"tau": 0.5}), (dpo_loss, {"beta": 0.5})):
        logits = reference.clone().requires_grad_()
        optimizer = torch.optim.Adam([logits], lr=0.05)
        for _ in range(2000):
            optimizer.zero_grad()
            policy = torch.log_softmax(logits, 0)
            loss(policy[:1], policy[1:], reference[:1], reference[1:], **options).backward()
            optimizer.step()
        end = torch.log_softmax(logits.detach(), 0) - reference
        margins[loss] = float(end[0] - end[1])
    assert margins[ipo_loss] == pytest.approx(1.0, abs=1e-3)
    assert margins[dpo_loss] > 10
