"""StableMax against mpmath at 60 digits, its closed-form gradient, and its definition in float64."""

from __future__ import annotations

import mpmath
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from trimtab.catalogue import method
from trimtab.errors import UsageError
from trimtab.losses import log_stablemax, stablemax_cross_entropy
from trimtab.testing import LossTestCase

_LOGITS = st.lists(
    st.one_of(
        st.floats(-50, 50, width=32), st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-30, -1e-30, 1e8, -1e8, 1e30, -1e30])
    ),
    min_size=1,
    max_size=6,
)


class TestStablemaxCrossEntropy(LossTestCase):
    loss = staticmethod(stablemax_cross_entropy)


class TestStablemaxInFloat64(LossTestCase):
    @staticmethod
    def loss(logits, targets, **options):
        loss = stablemax_cross_entropy(logits, targets, dtype=torch.float64, **options)
        assert loss.dtype == torch.float64
        return loss.to(torch.promote_types(logits.dtype, torch.float32))


def _exact(logits):
    """log StableMax by its definition, with 60 digits."""
    with mpmath.workdps(60):
        s = [mpmath.mpf(x) + 1 if x >= 0 else 1 / (1 - mpmath.mpf(x)) for x in logits]
        return [mpmath.log(value / mpmath.fsum(s)) for value in s]


@given(logits=_LOGITS)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-13), (torch.float32, 2e-6)], ids=str)
def test_equals_high_precision(dtype, bound, logits):
    result = log_stablemax(torch.tensor(logits, dtype=dtype))
    for value, exact in zip(result.tolist(), _exact(torch.tensor(logits, dtype=dtype).tolist()), strict=True):
        assert value == pytest.approx(float(exact), rel=bound, abs=bound)


@given(logits=_LOGITS, target=st.integers(0, 5))
def test_gradient_is_closed_form(logits, target):
    x = torch.tensor([logits], dtype=torch.float64, requires_grad=True)
    target %= len(logits)
    stablemax_cross_entropy(x, torch.tensor([target])).backward()
    # d loss / d x_i = (p_i - [i = y]) * s'(x_i) / s(x_i), and s' / s = 1 / (1 + |x|) on both sides.
    for i, (value, log_p) in enumerate(zip(logits, _exact(logits), strict=True)):
        expected = (mpmath.exp(log_p) - (i == target)) / (1 + abs(mpmath.mpf(value)))
        assert x.grad[0, i].item() == pytest.approx(float(expected), rel=1e-9, abs=1e-13)


def test_equals_the_definition_in_float64():
    """The definition as the authors compute it: log(s / sum s) in float64, gathered at the labels."""
    x = 20 * torch.randn(64, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(11, (64,), generator=torch.Generator().manual_seed(1))
    s = torch.where(x < 0, 1 / (1 - x + 1e-30), x + 1)
    expected = -torch.log(s / s.sum(dim=-1, keepdim=True))[torch.arange(64), labels].mean()
    torch.testing.assert_close(stablemax_cross_entropy(x, labels), expected, rtol=1e-13, atol=0)
    torch.testing.assert_close(stablemax_cross_entropy(x.float(), labels).double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("x", [1.0, -1.0, 0.0])
def test_gradient_is_finite_where_a_branch_divides_by_zero(x):
    logits = torch.tensor([[x, 2.0]], requires_grad=True)
    stablemax_cross_entropy(logits, torch.tensor([0])).backward()
    assert logits.grad.isfinite().all()
    assert logits.grad[0, 0] < 0


def test_does_not_collapse_where_softmax_does():
    logits = torch.tensor([[150.0, 0.0, -3.0]], requires_grad=True)
    assert F.cross_entropy(logits, torch.tensor([0])).item() == 0
    loss = stablemax_cross_entropy(logits, torch.tensor([0]))
    loss.backward()
    assert loss.item() > 1e-3
    assert logits.grad[0, 0] < 0


def test_other_dimensions():
    x = torch.randn(2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(log_stablemax(x, dim=1), log_stablemax(x.transpose(1, 2)).transpose(1, 2))
    torch.testing.assert_close(log_stablemax(x, dim=0).exp().sum(dim=0), torch.ones(3, 4, dtype=torch.float64))


def test_remedy_takes_the_place_of_a_loss():
    logits, targets = torch.randn(3, 4, generator=torch.Generator().manual_seed(3)), torch.tensor([0, 1, 2])
    remedied = method("stablemax").apply(F.cross_entropy, dtype=torch.float64)
    torch.testing.assert_close(remedied(logits, targets), stablemax_cross_entropy(logits.double(), targets))


def test_half_precision_is_refused():
    with pytest.raises(UsageError, match=r"dtype must be torch\.float32 or torch\.float64, got torch\.bfloat16"):
        log_stablemax(torch.zeros(2), dtype=torch.bfloat16)
