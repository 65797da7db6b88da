"""Rectified targets against a plain loop, their bound, the loss against torch's, and its contract."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from trimtab.errors import UsageError
from trimtab.losses import annealed, rectified_cross_entropy, rectified_targets
from trimtab.testing import LossTestCase

# One row of teacher logits for each target; the last class has none of the probability, as one that is masked out.
_TABLE = 2 * torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
_TABLE[:, -1] = -math.inf


def _teacher(logits, targets):
    return _TABLE[targets.long().clamp(min=0), : logits.shape[-1]]


class TestRectifiedCrossEntropy(LossTestCase):
    @staticmethod
    def loss(logits, targets, **options):
        return rectified_cross_entropy(logits, targets, teacher_logits=_teacher(logits, targets), **options)


def _loop(teacher, label, tau, mix):
    """Equations 3 to 5 for one sample."""
    weights = [math.exp(value / tau) for value in teacher]
    q = [weight / sum(weights) for weight in weights]
    own = min(max(mix - (max(q) - q[label]), 0.0), 1.0)
    return [own * value + (1 - own) * (k == label) for k, value in enumerate(q)]


def test_targets_equal_a_plain_loop():
    generator = torch.Generator().manual_seed(0)
    teacher = 3 * torch.randn(40, 7, dtype=torch.float64, generator=generator)
    labels = torch.randint(7, (40,), generator=generator)
    found = rectified_targets(teacher, labels, temperature=1.7, mix=0.8)
    expected = [_loop(row, label, 1.7, 0.8) for row, label in zip(teacher.tolist(), labels.tolist(), strict=True)]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-15)


@given(
    teacher=st.lists(st.floats(-30, 30, width=32), min_size=2, max_size=6),
    label=st.integers(0, 5),
    tau=st.floats(0.05, 10),
    mix=st.floats(0, 1),
)
def test_the_true_class_stays_on_top(teacher, label, tau, mix):
    label %= len(teacher)
    found = rectified_targets(torch.tensor([teacher]), torch.tensor([label]), temperature=tau, mix=mix)[0]
    assert float(found.sum()) == pytest.approx(1, abs=1e-6)
    assert float(found.min()) >= 0
    assert float(found[label]) >= float(found.max()) - 1e-6


def test_a_confident_wrong_teacher_is_not_heard():
    wrong = torch.tensor([[20.0, 0.0, 0.0]])
    found = rectified_targets(wrong, torch.tensor([1]), temperature=1.0, mix=0.95)
    torch.testing.assert_close(found, torch.tensor([[0.0, 1.0, 0.0]]))


def test_equals_torch_on_probabilities():
    """Torch's own cross-entropy takes probabilities; one-hot targets at lambda 0."""
    generator = torch.Generator().manual_seed(1)
    logits, teacher = torch.randn(2, 9, 4, dtype=torch.float64, generator=generator)
    labels = torch.randint(4, (9,), generator=generator)
    targets = rectified_targets(teacher, labels, temperature=1.3, mix=0.9)
    found = rectified_cross_entropy(logits, labels, teacher_logits=teacher, temperature=1.3, mix=0.9)
    torch.testing.assert_close(found, F.cross_entropy(logits, targets))
    plain = rectified_cross_entropy(logits, labels, teacher_logits=teacher, mix=0.0)
    torch.testing.assert_close(plain, F.cross_entropy(logits, labels))


def test_teacher_gets_no_gradient():
    teacher = torch.randn(3, 4, generator=torch.Generator().manual_seed(2)).requires_grad_()
    logits = torch.zeros(3, 4, requires_grad=True)
    rectified_cross_entropy(logits, torch.tensor([0, 1, 2]), teacher_logits=teacher).backward()
    assert teacher.grad is None
    assert logits.grad.abs().sum() > 0


def test_schedule_ends_where_it_should():
    assert annealed(0.7, 0.95, 0) == pytest.approx(0.7)
    assert annealed(0.7, 0.95, 1) == pytest.approx(0.95)
    values = [annealed(0.7, 0.95, step / 10) for step in range(11)]
    assert values == sorted(values)


def test_arguments_are_checked():
    logits, labels = torch.zeros(2, 3), torch.tensor([0, 1])
    with pytest.raises(UsageError, match="temperature must be above 0"):
        rectified_targets(logits, labels, temperature=0)
    with pytest.raises(UsageError, match="mix must be at least 0 and at most 1"):
        rectified_targets(logits, labels, mix=1.5)
    with pytest.raises(UsageError, match="teacher_logits must have the shape"):
        rectified_cross_entropy(logits, labels, teacher_logits=torch.zeros(2, 4))
    with pytest.raises(UsageError, match="progress must be"):
        annealed(1, 2, 1.1)
