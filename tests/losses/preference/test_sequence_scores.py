"""Log-probabilities of responses against a plain loop."""

from __future__ import annotations

import math

import torch

from trimtab.losses import sequence_log_probs


def test_equals_a_plain_loop():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 5, 7, generator=generator, dtype=torch.float64)
    targets = torch.randint(7, (3, 5), generator=generator)
    targets[0, :2] = targets[2, 4] = -100
    scores = sequence_log_probs(logits, targets)
    for b in range(3):
        total, count = 0.0, 0
        for place in range(5):
            if (label := int(targets[b, place])) != -100:
                row = [math.exp(x) for x in logits[b, place].tolist()]
                total, count = total + math.log(row[label] / sum(row)), count + 1
        assert math.isclose(float(scores.log_probs[b]), total, rel_tol=1e-12)
        assert int(scores.lengths[b]) == count


def test_positions_that_do_not_count_have_no_gradient_even_where_they_overflow():
    logits = torch.zeros(1, 3, 4)
    logits[0, 0] = math.inf
    logits.requires_grad_()
    sequence_log_probs(logits, torch.tensor([[-100, 1, 2]])).log_probs.sum().backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    assert not logits.grad[0, 0].any()


def test_half_precision_is_summed_in_float32():
    logits = torch.zeros(1, 2000, 8, dtype=torch.bfloat16)
    scores = sequence_log_probs(logits, torch.zeros(1, 2000, dtype=torch.int64))
    assert scores.log_probs.dtype == torch.float32
    torch.testing.assert_close(scores.log_probs, torch.tensor([-2000 * math.log(8)]))
