"""Repetition by counting, the loss against a plain loop, and its policy gradient against an enumerated expectation."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trimtab.errors import UsageError
from trimtab.losses import implicit_unlikelihood_loss, repeated_ngrams, sequence_repetition

_B, _L, _V = 4, 9, 3


def _batch(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(_B, _L, _V, generator=generator, dtype=torch.float64)
    samples = torch.randint(_V, (_B, _L), generator=generator)
    samples[1, 6:] = samples[3, :2] = -100
    return logits.to(dtype).requires_grad_(), samples


def _count(tokens, n):
    """Return seq-rep-n and the tokens of n-grams seen before, with a set."""
    seen, repeats, marked, total = set(), 0, set(), 0
    for j in range(len(tokens) - n + 1):
        gram = tuple(tokens[j : j + n])
        if -100 in gram:
            continue
        total += 1
        if gram in seen:
            repeats += 1
            marked |= set(range(j, j + n))
        seen.add(gram)
    distinct = len(seen)
    return (1 - distinct / total if total else 0.0), [j in marked for j in range(len(tokens))]


@given(tokens=st.lists(st.sampled_from([0, 1, 2, -100]), min_size=0, max_size=14), n=st.integers(1, 5))
def test_repetition_equals_a_count(tokens, n):
    share, marked = _count(tokens, n)
    row = torch.tensor([tokens], dtype=torch.int64).reshape(1, -1)
    assert float(sequence_repetition(row, n=n)) == pytest.approx(share, abs=1e-6)
    assert repeated_ngrams(row, n=n)[0].tolist() == marked


def test_equals_a_plain_loop():
    logits, samples = _batch()
    rewards = [1 - _count(row, 2)[0] for row in samples.tolist()]
    total, count = 0.0, 0
    for b in range(_B):
        marked = _count(samples[b].tolist(), 2)[1]
        for t in range(_L):
            if (y := int(samples[b, t])) == -100:
                continue
            weights = [math.exp(float(value)) for value in logits[b, t].tolist()]
            p = weights[y] / sum(weights)
            total -= 1.5 * (rewards[b] - sum(rewards) / _B) * math.log(p)
            total -= 0.5 * math.log(1 - p) if marked[t] else 0.0
            count += 1
    found = implicit_unlikelihood_loss(logits, samples, n=2, alpha=0.5, beta=1.5)
    assert float(found.detach()) == pytest.approx(total / count, rel=1e-6)


def test_gradient_is_that_of_the_expected_reward():
    """Averaged over every sample with its probability, the first term's gradient is that of -E[R], exactly."""
    table = torch.tensor([[0.3, -0.2], [0.1, 0.5], [-0.4, 0.2], [0.0, 0.9]], dtype=torch.float64, requires_grad=True)
    samples = torch.tensor(list(itertools.product(range(2), repeat=4)))
    log_p = torch.log_softmax(table, -1)
    p = log_p[torch.arange(4), samples].sum(1).exp()
    (expected,) = torch.autograd.grad(-(p * (1 - sequence_repetition(samples, n=2))).sum(), table, retain_graph=True)
    each = implicit_unlikelihood_loss(
        table.expand(16, 4, 2), samples, n=2, alpha=0, beta=1, baseline=0.37, reduction="none"
    )
    (found,) = torch.autograd.grad((p.detach() * each.sum(1)).sum(), table)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("options", [{"alpha": 0.7}, {"beta": 0.0}, {"alpha": 0.0}], ids=str)
def test_gradcheck(options):
    logits, samples = _batch()
    assert torch.autograd.gradcheck(
        lambda x: implicit_unlikelihood_loss(x, samples, n=2, reduction="none", **options), (logits,)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_computed_in_float32_or_better(dtype):
    logits, samples = _batch(dtype)
    loss = implicit_unlikelihood_loss(logits, samples, n=2)
    loss.backward()
    assert loss.dtype == torch.float32
    assert logits.grad.dtype == dtype
    exact = implicit_unlikelihood_loss(logits.detach().double(), samples, n=2)
    torch.testing.assert_close(loss.detach().double(), exact, rtol=1e-5, atol=1e-6)


def test_micro_batches_add_up():
    logits, samples = _batch()
    mean = (1 - sequence_repetition(samples, n=2)).mean()
    (whole,) = torch.autograd.grad(implicit_unlikelihood_loss(logits, samples, n=2), logits)
    parts = []
    for rows in (slice(0, 1), slice(1, 4)):
        leaf = logits.detach()[rows].clone().requires_grad_()
        loss = implicit_unlikelihood_loss(
            leaf, samples[rows], n=2, baseline=mean, denominator=int((samples >= 0).sum())
        )
        parts += torch.autograd.grad(loss, leaf)
    torch.testing.assert_close(torch.cat(parts), whole)


def test_ignored_positions_and_nothing_to_learn_from():
    logits, samples = _batch()
    spoiled = logits.detach().clone()
    spoiled[1, 7] = math.inf
    spoiled.requires_grad_()
    loss = implicit_unlikelihood_loss(spoiled, samples, n=2)
    loss.backward()
    torch.testing.assert_close(loss, implicit_unlikelihood_loss(logits, samples, n=2))
    assert spoiled.grad.isfinite().all()
    for x, y in [(logits, torch.full_like(samples, -100)), (logits[:0], samples[:0]), (logits[:, :0], samples[:, :0])]:
        loss = implicit_unlikelihood_loss(x, y)
        (gradient,) = torch.autograd.grad(loss, logits)
        assert float(loss.detach()) == 0
        assert not gradient.any()


def test_samples_without_any_token_leave_the_baseline_alone():
    logits, samples = _batch()
    padded = torch.cat([samples, torch.full_like(samples[:1], -100)])
    loss = implicit_unlikelihood_loss(torch.cat([logits, logits[:1]]), padded, n=2)
    torch.testing.assert_close(loss, implicit_unlikelihood_loss(logits, samples, n=2))


def test_arguments_are_checked():
    logits, samples = _batch()
    with pytest.raises(UsageError, match="n must be a whole number"):
        implicit_unlikelihood_loss(logits, samples, n=0)
    with pytest.raises(UsageError, match="beta must be at least 0"):
        implicit_unlikelihood_loss(logits, samples, beta=-1)
    with pytest.raises(UsageError, match=r"tokens must be class indices \[B, L\]"):
        sequence_repetition(samples[0])
