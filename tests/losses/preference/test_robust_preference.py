"""Robust DPO against NumPy, and its expectation over flips of labels."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from trimtab.errors import UsageError
from trimtab.losses import dpo_loss, robust_dpo_loss
from trimtab.testing import PreferenceLossTestCase


class TestRobustDPO(PreferenceLossTestCase):
    loss = staticmethod(robust_dpo_loss)


@pytest.mark.parametrize("rate", [0.0, 0.2, 0.45])
def test_equals_numpy(rate):
    values = np.random.default_rng(0).normal(-5, 2, (4, 7))
    pw, pl, rw, rl = values
    p = 1 / (1 + np.exp(-0.3 * ((pw - pl) - (rw - rl))))
    expected = (-(1 - rate) * np.log(p) + rate * np.log(1 - p)) / (1 - 2 * rate)
    found = robust_dpo_loss(*map(torch.tensor, values), beta=0.3, flip_rate=rate, reduction="none")
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-11)


@pytest.mark.parametrize("rate", [0.1, 0.4])
def test_expectation_over_flips_is_dpo(rate):
    pw, pl, rw, rl = torch.randn(4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    right = robust_dpo_loss(pw, pl, rw, rl, flip_rate=rate, reduction="none")
    wrong = robust_dpo_loss(pl, pw, rl, rw, flip_rate=rate, reduction="none")
    clean = dpo_loss(pw, pl, rw, rl, reduction="none")
    torch.testing.assert_close((1 - rate) * right + rate * wrong, clean, rtol=1e-12, atol=1e-14)
    # The conservative form is biased: its expectation is another.
    biased = [
        dpo_loss(*scores, label_smoothing=rate, reduction="none") for scores in ((pw, pl, rw, rl), (pl, pw, rl, rw))
    ]
    assert ((1 - rate) * biased[0] + rate * biased[1] - clean).abs().max() > 1e-3


def test_options_outside_their_range():
    for rate in (0.5, 0.6, -0.1):
        with pytest.raises(UsageError, match="flip_rate must be"):
            robust_dpo_loss(*torch.zeros(4, 2), flip_rate=rate)
