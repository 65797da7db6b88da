"""PMPO against NumPy, its KL against a plain loop, and learning from rejected responses alone."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from trimtab.errors import UsageError
from trimtab.losses import pmpo_loss, reference_kl
from trimtab.testing import PreferenceLossTestCase


class TestPMPO(PreferenceLossTestCase):
    loss = staticmethod(pmpo_loss)
    scores = ("policy", "kl")

    def arguments(self, dtype=torch.float64):
        return {**super().arguments(dtype), "accepted": torch.arange(6) % 3 == 0}


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_equals_numpy(alpha):
    """The mean over the batch is J itself, means over either kind, if the share is that of the batch."""
    generator = np.random.default_rng(0)
    pi, kl, good = generator.normal(-5, 2, 8), generator.random(8), np.arange(8) % 4 == 0
    objective = alpha * pi[good].mean() - (1 - alpha) * pi[~good].mean() - 0.7 * kl.mean()
    found = pmpo_loss(*map(torch.tensor, (pi, kl, good)), accepted_share=float(good.mean()), alpha=alpha, beta=0.7)
    assert float(found) == pytest.approx(-objective, rel=1e-12)


def test_reference_kl_equals_a_plain_loop():
    generator = torch.Generator().manual_seed(0)
    policy, reference = torch.randn(2, 3, 4, 5, generator=generator, dtype=torch.float64)
    targets = torch.zeros(3, 4, dtype=torch.int64)
    targets[0, 1] = targets[2, 3] = -100
    policy[0, 1], reference[2, 3] = math.inf, math.inf
    policy.requires_grad_()
    found = reference_kl(policy, reference, targets)
    found.sum().backward()
    assert policy.grad.isfinite().all()
    for b in range(3):
        total = 0.0
        for place in range(4):
            if targets[b, place] != -100:
                p = [math.exp(x) for x in policy[b, place].tolist()]
                r = [math.exp(x) for x in reference[b, place].tolist()]
                for x, y in zip(p, r, strict=True):
                    total += y / sum(r) * math.log(y / sum(r) * sum(p) / x)
        assert float(found[b].detach()) == pytest.approx(total, rel=1e-12)


def _rejected_only(beta, steps):
    """Arms 0 and 1 are rejected, with shares 0.7 and 0.3; return the policy after gradient steps."""
    reference = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    share = torch.tensor([0.7, 0.3, 0.0, 0.0], dtype=torch.float64)
    logits = reference.log().requires_grad_()
    bad = torch.zeros(4, dtype=torch.bool)
    for _ in range(steps):
        policy = torch.log_softmax(logits, 0)
        kl = (reference * (reference.log() - policy)).sum().expand(4)
        each = pmpo_loss(policy, kl, bad, accepted_share=0.0, alpha=0.5, beta=beta, reduction="none")
        (gradient,) = torch.autograd.grad((share * each).sum(), logits)
        logits = (logits - 0.5 * gradient).detach().requires_grad_()
    return reference, share, torch.softmax(logits, 0).detach()


def test_rejected_alone_end_at_the_analytical_policy():
    reference, share, policy = _rejected_only(beta=2.0, steps=300)
    expected = 2.0 * reference - 0.5 * share
    torch.testing.assert_close(policy, expected / expected.sum(), rtol=1e-6, atol=1e-9)


def test_rejected_alone_diverge_without_kl():
    _, _, early = _rejected_only(beta=0.0, steps=50)
    _, _, late = _rejected_only(beta=0.0, steps=200)
    assert late[0] < early[0] * 1e-4
    assert late[0] < 1e-10


def test_accepted_alone_is_maximum_likelihood():
    scores = torch.tensor([-2.0, -4.0])
    loss = pmpo_loss(scores, torch.zeros(2), torch.ones(2, dtype=torch.bool), accepted_share=1.0, alpha=1.0, beta=0.0)
    assert float(loss) == 3.0


def test_labels_and_shares_are_checked():
    zero, good = torch.zeros(2), torch.tensor([True, False])
    with pytest.raises(UsageError, match="accepted must be boolean"):
        pmpo_loss(zero, zero, torch.ones(2))
    for share in (0.0, 1.0):
        with pytest.raises(UsageError, match="response of the other kind"):
            pmpo_loss(zero, zero, good, accepted_share=share)
    with pytest.raises(UsageError, match="ref_logits must have shape"):
        reference_kl(torch.zeros(1, 2, 3), torch.zeros(1, 2, 4), torch.zeros(1, 2, dtype=torch.int64))
