"""Negative-aware training's side of the loss against a plain loop, and the paper's setting."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from trimtab.losses import negative_aware_loss


def _batch():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 4, 5, generator=generator, dtype=torch.float64)
    targets = torch.randint(5, (3, 4), generator=generator)
    targets[0, :2] = targets[2, 3] = -100
    return logits, targets, torch.tensor([True, False, True])


@pytest.mark.parametrize("weight", [0.0, 0.3])
def test_equals_a_plain_loop(weight):
    logits, targets, positive = _batch()
    total, weights = 0.0, 0.0
    for b in range(3):
        for i in range(4):
            if targets[b, i] != -100:
                row, w = [math.exp(x) for x in logits[b, i].tolist()], 1.0 if positive[b] else weight
                total -= w * math.log(row[int(targets[b, i])] / sum(row))
                weights += w
    found = negative_aware_loss(logits, targets, positive, negative_weight=weight)
    assert float(found) == pytest.approx(total / weights, rel=1e-12)


def test_weight_1_is_plain_fine_tuning():
    logits, targets, positive = _batch()
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(negative_aware_loss(logits, targets, positive), expected)
