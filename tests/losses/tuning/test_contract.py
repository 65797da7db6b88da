"""What each loss of fine-tuning on logits must hold: gradients, precision, micro-batches, ignored positions."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from trimtab.errors import UsageError
from trimtab.losses import (
    advantage_weighted_loss,
    key_token_weights,
    negative_aware_loss,
    sftmix_loss,
    tl_training_loss,
    unlikelihood_loss,
)

_B, _L, _V = 4, 5, 6


def _masks():
    generator = torch.Generator().manual_seed(3)
    return torch.rand(2, _B, _L, generator=generator) < 0.3


def _cases():
    """Each loss as a function of (logits, targets, rows, options), where rows are those of its other arguments."""
    key, bad = _masks()
    number = torch.linspace(-1, 1, _B, dtype=torch.float64)
    generator = torch.Generator().manual_seed(4)
    other = torch.randn(_B, _L, _V, generator=generator, dtype=torch.float64)
    labels = torch.randint(_V, (_B, _L), generator=generator)
    labels[1, :2] = -100
    return {
        "advantage": lambda x, y, rows, **o: advantage_weighted_loss(x, y, number[rows], **o),
        "negative": lambda x, y, rows, **o: negative_aware_loss(x, y, (number > 0)[rows], negative_weight=0.4, **o),
        "tool": lambda x, y, rows, **o: tl_training_loss(x, y, key=key[rows], erroneous=bad[rows], **o),
        "unlikelihood": lambda x, y, rows, **o: unlikelihood_loss(x, y, bad[rows], alpha=0.7, **o),
        "mixup": lambda x, y, rows, **o: sftmix_loss(
            x, other[rows].to(x.dtype), y, labels[rows], number[rows].abs(), **o
        ),
    }


CASES = pytest.mark.parametrize("name", _cases())
ALL = slice(0, _B)


def _batch(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(_B, _L, _V, generator=generator, dtype=torch.float64)
    targets = torch.randint(_V, (_B, _L), generator=generator)
    targets[0, :2] = targets[2, 4] = -100
    return logits.to(dtype).requires_grad_(), targets


@CASES
def test_gradcheck(name):
    logits, targets = _batch()
    assert torch.autograd.gradcheck(lambda x: _cases()[name](x, targets, ALL, reduction="none"), (logits,))


@CASES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_computed_in_float32_or_better(name, dtype):
    logits, targets = _batch(dtype)
    loss = _cases()[name](logits, targets, ALL)
    loss.backward()
    assert loss.dtype == torch.float32
    assert logits.grad.dtype == dtype
    if name != "mixup":  # the other half of its logits is rounded too
        exact = _cases()[name](logits.detach().double(), targets, ALL)
        torch.testing.assert_close(loss.detach().double(), exact, rtol=1e-5, atol=1e-6)


@CASES
@pytest.mark.parametrize("sizes", [(2, 2), (1, 3), (1, 1, 1, 1)], ids=str)
def test_micro_batches_add_up(name, sizes):
    logits, targets = _batch()
    loss = _cases()[name]
    (whole,) = torch.autograd.grad(loss(logits, targets, ALL, denominator=7.5), logits)
    parts, start = [], 0
    for size in sizes:
        rows = slice(start, start + size)
        leaf = logits.detach()[rows].clone().requires_grad_()
        loss(leaf, targets[rows], rows, denominator=7.5).backward()
        parts.append(leaf.grad)
        start += size
    torch.testing.assert_close(torch.cat(parts), whole)


@CASES
def test_reductions_agree(name):
    logits, targets = _batch()
    loss = _cases()[name]
    each = loss(logits, targets, ALL, reduction="none")
    assert each.shape == targets.shape
    torch.testing.assert_close(loss(logits, targets, ALL, reduction="sum"), each.sum())
    torch.testing.assert_close(loss(logits, targets, ALL, denominator=2.5), each.sum() / 2.5)


@CASES
def test_positions_that_do_not_count(name):
    logits, targets = _batch()
    spoiled = logits.detach().clone()
    spoiled[0, 0] = math.inf
    spoiled.requires_grad_()
    loss = _cases()[name](spoiled, targets, ALL)
    loss.backward()
    torch.testing.assert_close(loss, _cases()[name](logits, targets, ALL))
    assert spoiled.grad.isfinite().all()
    assert not spoiled.grad[0, 0].any()


@pytest.mark.parametrize("name", ["advantage", "negative", "tool", "unlikelihood"])
def test_nothing_to_learn_from(name):
    logits, targets = _batch()
    loss = _cases()[name](logits, torch.full_like(targets, -100), ALL)
    loss.backward()
    assert loss.detach() == 0
    assert not logits.grad.any()


def test_what_does_not_fit_is_refused():
    logits, targets = torch.zeros(_B, _L, _V), torch.zeros(_B, _L, dtype=torch.int64)
    with pytest.raises(UsageError, match="advantages must have shape"):
        advantage_weighted_loss(logits, targets, torch.zeros(_L))
    with pytest.raises(UsageError, match="positive must be boolean of shape"):
        negative_aware_loss(logits, targets, torch.zeros(_B))
    with pytest.raises(UsageError, match="bad must be boolean of shape"):
        unlikelihood_loss(logits, targets, torch.zeros(_B, dtype=torch.bool))
    with pytest.raises(UsageError, match="max_weight must be at least 1"):
        key_token_weights(torch.ones(1, 2, dtype=torch.bool), max_weight=0.5)
    with pytest.raises(UsageError, match="pairs must have one shape"):
        sftmix_loss(logits, logits[:, :-1], targets, targets[:, :-1], torch.zeros(_B))
    with pytest.raises(UsageError, match="mix must hold a number in"):
        sftmix_loss(logits, logits, targets, targets, torch.full((_B,), 1.5))


def plain(logits, targets):
    """Cross-entropy as torch has it."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def test_neutral_settings_equal_torch():
    logits, targets = _batch()
    none, zero = torch.zeros(_B, _L, dtype=torch.bool), torch.zeros(_B)
    expected = plain(logits, targets)
    torch.testing.assert_close(advantage_weighted_loss(logits, targets, zero), expected)
    torch.testing.assert_close(negative_aware_loss(logits, targets, zero > 0), expected)
    torch.testing.assert_close(tl_training_loss(logits, targets), expected)
    torch.testing.assert_close(unlikelihood_loss(logits, targets, none), expected)
