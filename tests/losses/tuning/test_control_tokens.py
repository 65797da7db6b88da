"""Control tokens against a plain loop, and conditional training on a toy language."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from trimtab.errors import UsageError
from trimtab.losses import prepend_control


def test_equals_a_plain_loop():
    generator = torch.Generator().manual_seed(0)
    inputs, targets = torch.randint(9, (2, 5, 4), generator=generator)
    good = torch.tensor([True, False, False, True, True])
    found = prepend_control(inputs, targets, good, torch.tensor([11, 12]), torch.tensor([13, 14]), ignore_index=-7)
    for b in range(5):
        prefix = [11, 12] if good[b] else [13, 14]
        assert found.inputs[b].tolist() == prefix + inputs[b].tolist()
        assert found.targets[b].tolist() == [-7, -7, *targets[b].tolist()]


def test_same_prefix_is_plain_training():
    """With one prefix for both kinds, the label makes no difference to inputs, targets, and so to the loss."""
    rows, one = torch.arange(6).view(2, 3), torch.tensor([9])
    marked = [prepend_control(rows, rows, good, one, one) for good in (torch.tensor([True, False]), torch.ones(2) > 0)]
    assert torch.equal(marked[0].inputs, marked[1].inputs)
    logits = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0))
    loss = F.cross_entropy(logits.flatten(0, 1), marked[0].targets.flatten())
    torch.testing.assert_close(loss, F.cross_entropy(logits[:, 1:].flatten(0, 1), rows.flatten()))


def test_the_good_token_lowers_bad_content():
    """One word a text, word 3 is bad; a bigram model learns which words follow each control token, or a plain one."""
    words = torch.tensor([0, 1, 2, 3, 3, 3, 0, 1]).view(-1, 1)
    marked = prepend_control(words, words, words[:, 0] != 3, torch.tensor([4]), torch.tensor([5]))
    plain = prepend_control(words, words, words[:, 0] != 3, torch.tensor([4]), torch.tensor([4]))

    def bad_rate(data):
        table = torch.zeros(6, 4, requires_grad=True)
        for _ in range(200):
            loss = F.cross_entropy(table[data.inputs[:, 0]], data.targets[:, 1])
            (gradient,) = torch.autograd.grad(loss, table)
            table = (table - 2.0 * gradient).detach().requires_grad_()
        return float(torch.softmax(table[4].detach(), 0)[3])

    assert bad_rate(plain) == pytest.approx(3 / 8, abs=0.01)
    assert bad_rate(marked) < 0.02


def test_shapes_are_checked():
    rows, good, one = torch.zeros(2, 3, dtype=torch.int64), torch.ones(2, dtype=torch.bool), torch.tensor([1])
    with pytest.raises(UsageError, match="prefixes must be"):
        prepend_control(rows, rows, good, one, torch.tensor([1, 2]))
    with pytest.raises(UsageError, match="good must be boolean"):
        prepend_control(rows, rows, good[:1], one, one)
    with pytest.raises(UsageError, match="inputs and targets must be"):
        prepend_control(rows, rows[:1], good, one, one)
