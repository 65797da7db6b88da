"""DCO against mpmath at 60 digits, its gradient, its limit, and coverage of answers that are ambiguous."""

from __future__ import annotations

import mpmath
import pytest
import torch

from trimtab.errors import UsageError
from trimtab.losses import dco_loss
from trimtab.testing import PreferenceLossTestCase

_SCORES = [-1e-9, -1e-3, -0.1, -0.6931, -2.0, -6.9, -11.9, -12.1, -15.0, -40.0, -700.0, -1e4]


class TestDCO(PreferenceLossTestCase):
    loss = staticmethod(dco_loss)
    scores = ("policy",)
    policy = 1

    def test_what_does_not_fit_is_refused(self):
        with pytest.raises(UsageError, match="floating-point"):
            dco_loss(torch.zeros(2, dtype=torch.int64))
        for samples in (0, 2.0, True):
            with pytest.raises(UsageError, match="samples must be a whole number"):
                dco_loss(torch.zeros(2), samples=samples)


@pytest.mark.parametrize("samples", [1, 2, 7, 64, 1000, 10**6])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-13), (torch.float32, 3e-6)], ids=str)
def test_equals_high_precision(samples, dtype, bound):
    scores = torch.tensor(_SCORES, dtype=dtype)
    found = dco_loss(scores, samples=samples, reduction="none").tolist()
    with mpmath.workdps(60):
        for score, value in zip(scores.tolist(), found, strict=True):
            coverage = -mpmath.expm1(samples * mpmath.log1p(-mpmath.exp(mpmath.mpf(score))))
            assert value == pytest.approx(float(-mpmath.log(coverage)), rel=bound, abs=bound)


@pytest.mark.parametrize("samples", [1, 4, 256])
def test_gradient_is_cross_entropy_times_the_factor(samples):
    scores = torch.tensor([-0.01, -0.5, -3.0, -7.5, -30.0, -800.0], dtype=torch.float64, requires_grad=True)
    dco_loss(scores, samples=samples, reduction="sum").backward()
    for score, gradient in zip(scores.tolist(), scores.grad.tolist(), strict=True):
        with mpmath.workdps(400):
            p = mpmath.exp(mpmath.mpf(score))
            factor = samples * p * (1 - p) ** (samples - 1) / (1 - (1 - p) ** samples)
        assert gradient == pytest.approx(-float(factor), rel=1e-9, abs=1e-12)


def test_one_sample_is_cross_entropy():
    scores = torch.tensor([-1e-3, -0.3, -11.9, -12.1, -50.0], dtype=torch.float64)
    torch.testing.assert_close(dco_loss(scores, samples=1, reduction="none"), -scores, rtol=1e-12, atol=0)


@pytest.mark.parametrize("score", [0.0, -1e-40, -1e30])
def test_certainty_and_impossibility_are_finite(score):
    scores = torch.tensor([score], requires_grad=True)
    loss = dco_loss(scores, samples=1000)
    loss.backward()
    assert loss.isfinite()
    assert scores.grad.isfinite().all()


def test_coverage_of_ambiguous_answers():
    """Nine of ten labels are one answer: cross-entropy ends at 0.9, DCO hedges and covers the tenth more often."""
    share = torch.tensor([0.9, 0.1], dtype=torch.float64)

    def train(samples):
        logits = torch.zeros(2, dtype=torch.float64, requires_grad=True)
        for _ in range(400):
            each = dco_loss(torch.log_softmax(logits, 0), samples=samples, reduction="none")
            (gradient,) = torch.autograd.grad((share * each).sum(), logits)
            logits = (logits - 0.5 * gradient).detach().requires_grad_()
        return torch.softmax(logits, 0).detach()

    def coverage(policy):
        return float((share * (1 - (1 - policy) ** 8)).sum())

    greedy, hedged = train(1), train(8)
    torch.testing.assert_close(greedy, share, rtol=1e-6, atol=0)
    assert hedged[0] < 0.75
    assert coverage(hedged) > coverage(greedy) + 0.03
