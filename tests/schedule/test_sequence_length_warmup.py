"""Sequence-length warm-up: the pacing function in plain arithmetic, and what a step trains on."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trimtab.catalogue import method
from trimtab.errors import UsageError
from trimtab.schedule import length_warmup, truncate
from trimtab.workloads import train, workload


@given(start=st.integers(1, 16), longer=st.integers(0, 60), ramp=st.integers(1, 200))
def test_equals_the_pacing_function(start, longer, ramp):
    start, full = 8 * start, 8 * (start + longer)
    linear, root = length_warmup(full, ramp=ramp, start=start), length_warmup(full, ramp=ramp, start=start, degree=2)
    for step in range(0, 2 * ramp, 1 + ramp // 40):
        share = min(Fraction(step, ramp), Fraction(1))
        assert linear(step) == 8 * math.floor((start + (full - start) * share) / 8)
        exact = start + (full - start) * math.sqrt(share)
        if abs(exact / 8 - round(exact / 8)) > 1e-9:
            assert root(step) == 8 * math.floor(exact / 8)
    assert linear(0) == root(0) == start
    assert linear(ramp) == full


def test_a_full_length_that_is_no_multiple_is_kept():
    length = length_warmup(20, ramp=10)
    assert [length(step) for step in (0, 6, 7, 9, 10, 11)] == [8, 8, 16, 16, 20, 20]


def test_a_step_trains_on_the_first_tokens():
    tokens = torch.arange(3 * 64).view(3, 64)
    batches = method("length-warmup").apply(lambda step: (tokens + step, tokens + step + 1), model=None, steps=100)
    schedule = length_warmup(64, ramp=30)
    for step in range(40):
        inputs, targets = batches(step)
        assert inputs.shape == targets.shape == (3, schedule(step))
        assert torch.equal(inputs, tokens[:, : schedule(step)] + step)
        assert torch.equal(targets, inputs + 1)
    short = method("length-warmup").apply(lambda step: (tokens[:, :5], tokens[:, :5]), model=None, steps=100)
    assert short(0)[0].shape == (3, 5)


def test_a_run_on_short_sequences_trains():
    lm = workload("lm-small")
    outcome = train(lm, lm.defaults.replace(steps=4, batch_size=4, remedies=("length-warmup",)))
    assert not outcome.diverged


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: length_warmup(64, ramp=10, start=4), r"start must be in \[multiple, full\], here \[8, 64\], got 4"),
        (lambda: length_warmup(64, ramp=10, start=65), "got 65"),
        (lambda: length_warmup(64, ramp=10, degree=0.5), "degree must be at least 1 and finite, got 0.5"),
        (lambda: length_warmup(64, ramp=1.5), "ramp must be a whole number, at least 0, got 1.5"),
        (lambda: truncate(torch.zeros(4, 64), torch.zeros(4), 8), r"inputs \[4, 64\] and targets \[4\]"),
        (lambda: truncate(torch.zeros(4, 64), torch.zeros(4, 64), 0), "length must be a whole number, at least 1"),
    ],
)
def test_wrong_use_is_one_line(call, text):
    with pytest.raises(UsageError, match=text):
        call()
