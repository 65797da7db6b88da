"""SFTMix against a mixture before a linear head, its limit, and its split of a data set."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from trimtab.errors import UsageError
from trimtab.losses import sftmix_loss, split_by_confidence


def _pair():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 3, 4, 8, generator=generator, dtype=torch.float64)
    head = torch.nn.Linear(8, 5).double()
    with torch.no_grad():
        head.weight.normal_(generator=generator)
        head.bias.normal_(generator=generator)
    targets = torch.randint(5, (2, 3, 4), generator=generator)
    targets[0, 0, 0] = targets[1, 2, 3] = -100
    return hidden, head, targets, torch.tensor([0.0, 0.3, 0.9], dtype=torch.float64)


def test_equals_a_mixture_before_the_head():
    (z_c, z_u), head, (y_c, y_u), mix = _pair()
    both = (y_c != -100) & (y_u != -100)
    count = int((y_c != -100).sum() + (y_u != -100).sum())
    total = F.cross_entropy(head(z_c).flatten(0, 1), y_c.flatten(), reduction="sum")
    total = total + F.cross_entropy(head(z_u).flatten(0, 1), y_u.flatten(), reduction="sum")
    for b in range(3):
        for place in range(4):
            if both[b, place]:
                m = float(mix[b])
                label = m * F.one_hot(y_c[b, place], 5) + (1 - m) * F.one_hot(y_u[b, place], 5)
                logits = head(m * z_c[b, place] + (1 - m) * z_u[b, place])
                total = total + 0.7 * F.cross_entropy(logits, label)
    torch.testing.assert_close(sftmix_loss(head(z_c), head(z_u), y_c, y_u, mix, mu=0.7), total / count)


def test_mu_0_is_plain_fine_tuning():
    hidden, head, targets, mix = _pair()
    expected = F.cross_entropy(head(hidden).flatten(0, 2), targets.flatten())
    torch.testing.assert_close(sftmix_loss(*head(hidden), *targets, mix, mu=0.0), expected)


def test_split_is_by_the_mean_over_checkpoints():
    perplexities = torch.tensor([[9.0, 1.0, 4.0, 5.0, 7.0], [1.0, 3.0, 4.0, 1.0, 9.0]])  # means 5, 2, 4, 3, 8
    split = split_by_confidence(perplexities)
    assert split.confident.tolist() == [1, 3]
    assert split.unconfident.tolist() == [0, 4]
    with pytest.raises(UsageError, match="perplexities must be"):
        split_by_confidence(torch.ones(1))
