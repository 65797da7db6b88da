"""Schedules without an end: inverse square root, cyclic, untuned warm-up."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trimtab.errors import UsageError
from trimtab.schedule import ScheduleLR, adam_warmup, cyclic, inverse_sqrt
from trimtab.testing import ScheduleTestCase


class TestInverseSqrt(ScheduleTestCase):
    @staticmethod
    def schedule():
        return inverse_sqrt(warmup=10)


class TestCyclic(ScheduleTestCase):
    @staticmethod
    def schedule():
        return cyclic(10, policy="exp_range")


class TestAdamWarmup(ScheduleTestCase):
    @staticmethod
    def schedule():
        return adam_warmup(beta2=0.9, form="exponential")


@given(warmup=st.integers(1, 1000), step=st.integers(0, 10_000))
def test_inverse_sqrt_is_the_papers_up_to_a_factor(warmup, step):
    paper = min((step + 1) ** -0.5, (step + 1) * warmup**-1.5)
    assert inverse_sqrt(warmup=warmup)(step) == pytest.approx(paper * warmup**0.5)


@pytest.mark.parametrize("policy", ["triangular", "triangular2", "exp_range"])
def test_cyclic_equals_torchs(policy):
    one, two = (torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.8) for _ in range(2))
    ours = ScheduleLR(one, cyclic(7, low=0.25, policy=policy, gamma=0.99))
    peer = torch.optim.lr_scheduler.CyclicLR(
        two, 0.2, 0.8, step_size_up=7, mode=policy, gamma=0.99, cycle_momentum=False
    )
    for _ in range(60):
        assert one.param_groups[0]["lr"] == pytest.approx(two.param_groups[0]["lr"], abs=1e-12)
        for part in (one, two, ours, peer):
            part.step()


def test_cyclic_is_a_triangle():
    schedule = cyclic(4, low=0.2)
    assert [schedule(step) for step in range(9)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1, 0.8, 0.6, 0.4, 0.2])
    assert [cyclic(4, low=0.2, policy="triangular2")(step) for step in (4, 12, 20)] == pytest.approx([1, 0.6, 0.4])


@given(beta2=st.floats(0, 0.9999))
def test_adam_warmup_ends_after_two_over_one_minus_beta2(beta2):
    schedule = adam_warmup(beta2=beta2)
    end = 2 / (1 - beta2)
    assert schedule(math.ceil(end)) == 1
    assert schedule(0) == pytest.approx(min(1, 1 / end))
    slow = adam_warmup(beta2=beta2, form="exponential")
    assert slow(math.ceil(end) - 1) == pytest.approx(1 - math.exp(-math.ceil(end) / end * 2))


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: inverse_sqrt(warmup=0), "warmup must be a whole number of steps, at least 1"),
        (lambda: cyclic(0), "step_size must be"),
        (lambda: cyclic(policy="sine"), "unknown policy 'sine'"),
        (lambda: cyclic(gamma=0), r"gamma must be in \(0, 1\]"),
        (lambda: adam_warmup(beta2=1.0), r"beta2 must be in \[0, 1\), got 1.0"),
        (lambda: adam_warmup(form="cosine"), "unknown form 'cosine'"),
    ],
)
def test_wrong_use_is_one_line(call, text):
    with pytest.raises(UsageError, match=text):
        call()
