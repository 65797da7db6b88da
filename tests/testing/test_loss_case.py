"""The loss contract catches losses that break it, one fault at a time."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.autograd.gradcheck import GradcheckError

from trimtab.losses import stablemax_cross_entropy
from trimtab.testing import LossTestCase


def _torch_cross_entropy(logits, targets, *, reduction="mean", denominator=None):
    """Softmax cross-entropy as one would first write it."""
    values = F.cross_entropy(logits.float().flatten(0, -2), targets.flatten(), reduction="none").view(targets.shape)
    if reduction == "none":
        return values
    if reduction == "sum":
        return values.sum()
    return values.sum() / (denominator or (targets != -100).sum())


def _mean_over_all(logits, targets, *, reduction="mean", denominator=None):
    """A mean over ignored targets too."""
    values = stablemax_cross_entropy(logits, targets, reduction="none")
    return {"mean": values.mean(), "sum": values.sum(), "none": values}[reduction]


def _forgets_the_denominator(logits, targets, *, denominator=None, **options):
    return stablemax_cross_entropy(logits, targets, **options)


def _in_the_dtype_of_the_logits(logits, targets, **options):
    loss = stablemax_cross_entropy(logits, targets, **options)
    return loss.to(logits.dtype).to(loss.dtype)


def _random(logits, targets, **options):
    return stablemax_cross_entropy(logits, targets, **options) + 0 * torch.rand(())


def _hides_divergence(logits, targets, **options):
    return stablemax_cross_entropy(logits.nan_to_num(0, 0, 0), targets, **options)


@pytest.mark.parametrize(
    ("loss", "test", "arguments"),
    [
        (_torch_cross_entropy, "test_ignored_positions_do_not_count", (float("nan"),)),
        (_torch_cross_entropy, "test_nothing_that_counts", ()),
        (_torch_cross_entropy, "test_computed_in_float32_or_better", (torch.float64,)),
        (_mean_over_all, "test_reductions_agree", ()),
        (_mean_over_all, "test_micro_batches_add_up", ((1, 2, 5),)),
        (_forgets_the_denominator, "test_micro_batches_add_up", ((4, 4),)),
        (_forgets_the_denominator, "test_ranks_add_up", ()),
        (_in_the_dtype_of_the_logits, "test_computed_in_float32_or_better", (torch.bfloat16,)),
        (_random, "test_deterministic_and_pure", ()),
        (_hides_divergence, "test_a_diverged_logit_is_not_hidden", (float("inf"),)),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_catches(loss, test, arguments):
    class Case(LossTestCase):
        pass

    Case.loss = staticmethod(loss)
    with pytest.raises(AssertionError):
        getattr(Case(), test)(*arguments)


def test_catches_a_wrong_gradient():
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x

        @staticmethod
        def backward(ctx, gradient):
            return 2 * gradient

    class Case(LossTestCase):
        @staticmethod
        def loss(logits, targets, **options):
            return stablemax_cross_entropy(Wrong.apply(logits), targets, **options)

    with pytest.raises(GradcheckError):
        Case().test_gradcheck()
