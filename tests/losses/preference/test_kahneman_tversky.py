"""KTO against NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from trimtab.errors import UsageError
from trimtab.losses import kto_loss
from trimtab.testing import PreferenceLossTestCase


class TestKTO(PreferenceLossTestCase):
    loss = staticmethod(kto_loss)
    scores = ("policy", "ref")
    policy = 1

    def arguments(self, dtype=torch.float64):
        return {**super().arguments(dtype), "desirable": torch.arange(6) % 3 == 0}


@pytest.mark.parametrize("kl", [-0.7, 0.0, 1.3])
def test_equals_numpy(kl):
    pi, ref = np.random.default_rng(0).normal(-5, 2, (2, 8))
    good = np.arange(8) % 2 == 0
    z = max(0.0, kl)
    value = np.where(good, 1.5 / (1 + np.exp(-0.3 * (pi - ref - z))), 0.8 / (1 + np.exp(-0.3 * (z - pi + ref))))
    expected = np.where(good, 1.5, 0.8) - value
    found = kto_loss(
        torch.tensor(pi),
        torch.tensor(ref),
        torch.tensor(good),
        kl=torch.tensor(kl, dtype=torch.float64),
        beta=0.3,
        desirable_weight=1.5,
        undesirable_weight=0.8,
        reduction="none",
    )
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12)


def test_the_reference_point_gets_no_gradient():
    kl = torch.tensor(0.5, requires_grad=True)
    policy = torch.zeros(2, requires_grad=True)
    kto_loss(policy, torch.zeros(2), torch.tensor([True, False]), kl=kl).backward()
    assert kl.grad is None


def test_labels_and_point_are_checked():
    with pytest.raises(UsageError, match="desirable must be boolean"):
        kto_loss(torch.zeros(2), torch.zeros(2), torch.ones(2))
    with pytest.raises(UsageError, match="kl must be one number"):
        kto_loss(torch.zeros(2), torch.zeros(2), torch.ones(2, dtype=torch.bool), kl=torch.zeros(2))
