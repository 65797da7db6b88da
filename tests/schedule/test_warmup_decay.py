"""Cosine and linear decay against their closed forms and torch's schedulers."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trimtab.errors import UsageError
from trimtab.schedule import ScheduleLR, cosine, linear
from trimtab.testing import ScheduleTestCase


class TestCosine(ScheduleTestCase):
    @staticmethod
    def schedule():
        return cosine(50, warmup=5, floor=0.1)


class TestLinear(ScheduleTestCase):
    @staticmethod
    def schedule():
        return linear(50, warmup=5)


@given(total=st.integers(1, 500), data=st.data())
def test_closed_forms(total, data):
    warmup = data.draw(st.integers(0, total - 1))
    floor = data.draw(st.floats(0, 1))
    step = data.draw(st.integers(0, 2 * total))
    x = min(1.0, (step - warmup) / (total - warmup))
    ramp = (step + 1) / (warmup + 1)
    expected = {
        cosine: floor + (1 - floor) * math.cos(math.pi * x / 2) ** 2,
        linear: 1 - x + x * floor,
    }
    for make, value in expected.items():
        assert make(total, warmup=warmup, floor=floor)(step) == pytest.approx(
            ramp if step < warmup else value, abs=1e-12
        )


@pytest.mark.parametrize(
    ("schedule", "theirs"),
    [
        (cosine(40), lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 40)),
        (cosine(40, floor=0.25), lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 40, 0.2)),
        (linear(40), lambda optimizer: torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, 40)),
    ],
)
def test_equals_torchs_schedulers(schedule, theirs):
    one, two = (torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.8) for _ in range(2))
    ours, peer = ScheduleLR(one, schedule), theirs(two)
    for _ in range(40):
        assert one.param_groups[0]["lr"] == pytest.approx(two.param_groups[0]["lr"], abs=1e-12)
        for part in (one, two, ours, peer):
            part.step()


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: cosine(0), "total must be a whole number of steps, at least 1, got 0"),
        (lambda: cosine(10, warmup=10), "warmup 10 is more than the 9 steps in all"),
        (lambda: linear(10, floor=1.5), r"floor must be in \[0, 1\], got 1.5"),
        (lambda: linear(10.0), "total must be a whole number"),
        (lambda: linear(10)(-1), "step must be a whole number, at least 0, got -1"),
    ],
)
def test_wrong_use_is_one_line(call, text):
    with pytest.raises(UsageError, match=text):
        call()
