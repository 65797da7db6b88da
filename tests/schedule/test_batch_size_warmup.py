"""Batch-size warm-up: a plain count of samples, the exponential it is in steps, and exact resumption of the sampler."""

from __future__ import annotations

import io
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from trimtab.catalogue import method
from trimtab.errors import UsageError
from trimtab.schedule import BatchSizeSampler, batch_warmup


@given(start=st.integers(1, 9), rises=st.integers(0, 7), increment=st.integers(1, 5), ramp=st.integers(0, 300))
def test_equals_a_plain_count_of_samples(start, rises, increment, ramp):
    """As GPT-3's trainers count it: one increment more each time another (ramp / rises) samples were seen."""
    full = start + rises * increment
    size = batch_warmup(full, ramp=ramp, start=start, increment=increment)
    seen = 0
    for step in range(120):
        raised = rises if ramp == 0 or seen >= ramp else seen * rises // ramp
        assert size(step) == start + increment * raised, step
        seen += size(step)
    assert size(10**9) == full


def test_linear_in_samples_is_exponential_in_steps():
    """dn/dt = B_0 + (B - B_0) n / N has the solution B(t) = B_0 exp((B - B_0) t / N)."""
    size = batch_warmup(4096, ramp=2_000_000, start=256)
    for step in range(0, size.ramp, 50):
        assert size(step) == pytest.approx(256 * math.exp(3840 / 2_000_000 * step), rel=0.01)
    assert size.ramp == pytest.approx(2_000_000 / 3840 * math.log(16), rel=0.01)


def test_linear_in_steps():
    size = batch_warmup(10, ramp=8, start=2, increment=4, by="steps")
    assert [size(step) for step in range(10)] == [2, 2, 2, 2, 6, 6, 6, 6, 10, 10]


@given(samples=st.integers(8, 40), ramp=st.integers(0, 60), shuffle=st.booleans(), at=st.integers(0, 25))
def test_resumes_exactly_from_any_step(samples, ramp, shuffle, at):
    def sampler():
        return BatchSizeSampler(samples, batch_warmup(8, ramp=ramp, start=2, increment=3), seed=3, shuffle=shuffle)

    def stream(source, steps):
        batches = []
        while len(batches) < steps:
            expected = len(source)
            epoch = list(source)
            assert len(epoch) == expected
            batches += epoch
        return batches[:steps]

    through = stream(sampler(), 30)
    file = io.BytesIO()
    interrupted = sampler()
    for _ in range(at):
        next(iter(interrupted))
    torch.save(interrupted.state_dict(), file)
    file.seek(0)
    resumed = sampler()
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert stream(resumed, 30 - at) == through[at:]


def test_an_epoch_shows_each_sample_at_most_once_in_a_new_order():
    sampler = BatchSizeSampler(50, batch_warmup(8, ramp=100), seed=0)
    first, second = ([i for batch in epoch for i in batch] for epoch in (list(sampler), list(sampler)))
    for epoch in (first, second):
        assert len(set(epoch)) == len(epoch) > 42
    assert first != second
    other = [i for batch in BatchSizeSampler(50, batch_warmup(8, ramp=100), seed=1) for i in batch]
    assert other not in (first, second)


def test_a_loader_that_fetches_ahead_is_resumed_by_the_steps_taken():
    data = torch.arange(40)
    sampler = BatchSizeSampler(40, batch_warmup(8, ramp=30), seed=1)
    taken = []
    for batch in DataLoader(data, batch_sampler=sampler, num_workers=1, prefetch_factor=3):
        taken.append(batch.tolist())
        if len(taken) == 3:
            break
    assert sampler.state_dict()["step"] > 3
    resumed = BatchSizeSampler(40, batch_warmup(8, ramp=30))
    resumed.load_state_dict(sampler.state_dict(steps=3))
    rest = [batch.tolist() for batch in DataLoader(data, batch_sampler=resumed)]
    assert taken + rest == list(BatchSizeSampler(40, batch_warmup(8, ramp=30), seed=1))


def test_a_run_takes_the_first_samples():
    inputs = torch.arange(64).view(32, 2)
    batches = method("batch-warmup").apply(lambda step: (inputs + step, inputs[:, 0]), model=None, steps=100)
    schedule = batch_warmup(32, ramp=128, start=2)
    for step in range(100):
        x, y = batches(step)
        assert len(x) == len(y) == schedule(step)
        assert torch.equal(x, inputs[: len(x)] + step)
    assert len(batches(0)[0]) == 2


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (
            lambda: batch_warmup(8, ramp=10, start=9),
            "full must be start plus a multiple of increment, got 8 from 9",
        ),
        (lambda: batch_warmup(8, ramp=10, start=1, increment=2), "got 8 from 1 by 2"),
        (lambda: batch_warmup(8, ramp=-1), "ramp must be a whole number, at least 0, got -1"),
        (lambda: batch_warmup(8, ramp=1, by="tokens"), "unknown by 'tokens'"),
        (lambda: batch_warmup(8, ramp=1)(0.5), "step must be a whole number"),
        (lambda: BatchSizeSampler(7, batch_warmup(8, ramp=1)), "a batch of 8 needs as many samples, got 7"),
        (lambda: BatchSizeSampler(8, 4), "sizes must be a schedule"),
    ],
)
def test_wrong_use_is_one_line(call, text):
    with pytest.raises(UsageError, match=text):
        call()
