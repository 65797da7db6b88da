"""z-loss against NumPy in float64, its closed-form gradient, and transformers' router z-loss."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from trimtab.catalogue import method
from trimtab.errors import UsageError
from trimtab.losses import WithZLoss, z_loss
from trimtab.testing import LossTestCase


class TestZLoss(LossTestCase):
    @staticmethod
    def loss(logits, targets, **options):
        return z_loss(logits, 1e-2, targets=targets, **options)


def _numpy_z_loss(logits, coefficient):
    top = logits.max(axis=-1, keepdims=True)
    log_z = np.log(np.exp(logits - top).sum(axis=-1)) + top[..., 0]
    return coefficient * np.mean(log_z**2)


@given(
    samples=st.integers(1, 5),
    classes=st.integers(1, 7),
    scale=st.sampled_from([1e-3, 1.0, 30.0, 1e4]),
    seed=st.integers(0, 99),
)
def test_equals_numpy(samples, classes, scale, seed):
    logits = np.random.default_rng(seed).normal(size=(samples, classes)) * scale
    loss = z_loss(torch.from_numpy(logits), 0.3)
    np.testing.assert_allclose(loss.item(), _numpy_z_loss(logits, 0.3), rtol=1e-12, atol=1e-15)


def test_paper_coefficient_is_the_default():
    logits = torch.zeros(3, 8)
    assert z_loss(logits).item() == pytest.approx(1e-4 * np.log(8) ** 2)


def test_gradient_is_closed_form():
    logits = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    z_loss(logits, 0.5).backward()
    log_z = logits.detach().exp().sum(dim=-1, keepdim=True).log()
    expected = 0.5 * 2 * log_z * logits.detach().softmax(dim=-1) / 4
    torch.testing.assert_close(logits.grad, expected)


def test_it_holds_the_level_that_cross_entropy_leaves_free():
    logits = torch.tensor([[2.0, 1.0, 0.0]], dtype=torch.float64)
    shift = torch.zeros((), dtype=torch.float64, requires_grad=True)
    F.cross_entropy(logits + shift, torch.tensor([0])).backward()
    assert shift.grad.abs() < 1e-15
    z_loss(logits + shift, 1.0).backward()
    assert shift.grad.item() == pytest.approx(2 * logits.logsumexp(-1).item())


def test_equals_transformers_router_z_loss():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        modeling = pytest.importorskip("transformers.models.switch_transformers.modeling_switch_transformers")
    logits = torch.randn(2, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(z_loss(logits, 1.0), modeling.router_z_loss_func(logits))


def test_mask_and_targets_both_exclude():
    logits = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    targets, mask = torch.tensor([0, -100, 1, 2]), torch.tensor([True, True, False, True])
    expected = z_loss(logits[[0, 3]])
    torch.testing.assert_close(z_loss(logits, targets=targets, mask=mask), expected)
    torch.testing.assert_close(z_loss(logits, mask=torch.tensor([True, False, False, True])), expected)


def test_remedy_adds_to_a_loss():
    logits = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(3))
    targets = torch.randint(3, (2, 5), generator=torch.Generator().manual_seed(4))

    def cross_entropy(outputs, labels):
        return F.cross_entropy(outputs.flatten(0, -2), labels.flatten())

    remedied = method("z-loss").apply(cross_entropy, coefficient=0.7)
    expected = cross_entropy(logits, targets) + z_loss(logits, 0.7, targets=targets)
    torch.testing.assert_close(remedied(logits, targets), expected)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"coefficient": -1.0}, "coefficient must be at least 0, got -1.0"),
        ({"coefficient": float("nan")}, "coefficient"),
        ({"mask": torch.ones(2)}, "mask must be boolean"),
        ({"mask": torch.ones(3, dtype=torch.bool)}, "mask must be boolean of shape"),
        ({"targets": torch.zeros(3, dtype=torch.long)}, "do not fit logits"),
    ],
)
def test_wrong_arguments(options, text):
    with pytest.raises(UsageError, match=text):
        z_loss(torch.zeros(2, 4), **options)


def test_wrong_coefficient_of_the_remedy():
    with pytest.raises(UsageError, match="coefficient must be at least 0"):
        WithZLoss(F.cross_entropy, coefficient=-1.0)
