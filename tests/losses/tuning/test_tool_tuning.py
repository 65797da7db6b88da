"""TL-Training against a plain loop, and its neutral settings."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from trimtab.losses import key_token_weights, tl_training_loss


@pytest.mark.parametrize("bound", [2.0, 9.0])
def test_equals_a_plain_loop(bound):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 8, 5, generator=generator, dtype=torch.float64)
    targets = torch.randint(5, (3, 8), generator=generator)
    targets[0, :2] = -100
    key = torch.zeros(3, 8, dtype=torch.bool)
    key[0, 1:4] = key[1, 1] = key[1, 2] = key[1, 7] = key[2, :6] = True
    erroneous = torch.zeros_like(key)
    erroneous[1, 4:6] = erroneous[2, 5] = True
    total, weights = 0.0, 0.0
    for b in range(3):
        counts = [i for i in range(8) if targets[b, i] != -100 and not erroneous[b, i]]
        keys = [i for i in counts if key[b, i]]
        ratio = (len(counts) - len(keys)) / len(keys)
        for i in counts:
            row = [math.exp(x) for x in logits[b, i].tolist()]
            weight = min(ratio, bound) if i in keys and ratio > 1 else 1.0
            total -= weight * math.log(row[int(targets[b, i])] / sum(row))
            weights += weight
    found = tl_training_loss(logits, targets, key=key, erroneous=erroneous, max_weight=bound)
    assert float(found) == pytest.approx(total / weights, rel=1e-12)


def test_neutral_settings_are_plain_fine_tuning():
    logits = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([[0, 1, -100], [4, -100, 2]])
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    everything = torch.ones(2, 3, dtype=torch.bool)
    torch.testing.assert_close(tl_training_loss(logits, targets), expected)
    torch.testing.assert_close(tl_training_loss(logits, targets, key=everything), expected)
    torch.testing.assert_close(tl_training_loss(logits, targets, key=targets == 0, max_weight=1.0), expected)


def test_a_sequence_without_key_tokens_keeps_weight_1():
    valid = torch.ones(2, 3, dtype=torch.bool)
    key = torch.tensor([[True, False, False], [False, False, False]])
    assert key_token_weights(valid, key=key).tolist() == [[2.0, 1.0, 1.0], [1.0, 1.0, 1.0]]
