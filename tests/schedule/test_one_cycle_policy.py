"""1cycle: corners, straight lines, momentum mirrored, and torch's three-phase form."""

from __future__ import annotations

import pytest
import torch

from trimtab.errors import UsageError
from trimtab.schedule import OneCycleLR, one_cycle, one_cycle_momentum
from trimtab.testing import ScheduleTestCase


class TestOneCycle(ScheduleTestCase):
    @staticmethod
    def schedule():
        return one_cycle(40)


class TestMomentum(ScheduleTestCase):
    @staticmethod
    def schedule():
        return one_cycle_momentum(40)


def _optimizer(kind="sgd"):
    params = [torch.nn.Parameter(torch.ones(1))]
    return torch.optim.SGD(params, lr=1.0, momentum=0.5) if kind == "sgd" else torch.optim.AdamW(params, lr=1.0)


def test_corners_and_straight_lines():
    schedule, momentum = one_cycle(100, end=0.2, div=4, final_div=10), one_cycle_momentum(100, end=0.2)
    corners = {0: 0.25, 40: 1.0, 80: 0.25, 100: 0.025, 500: 0.025}
    assert {step: schedule(step) for step in corners} == pytest.approx(corners)
    for a, b in ((0, 40), (40, 80), (80, 100)):
        assert schedule((a + b) // 2) == pytest.approx((corners[a] + corners[b]) / 2)
    for step in range(81):
        height = (schedule(step) - 0.25) / 0.75
        assert momentum(step) == pytest.approx(0.95 - 0.1 * height)


def test_equals_torchs_three_phases():
    ours, theirs = _optimizer(), _optimizer()
    # torch counts its three phases from 0 to total - 1: the same corners need one step more there.
    one = OneCycleLR(ours, 100, end=0.2, div=25, final_div=1e4)
    two = torch.optim.lr_scheduler.OneCycleLR(
        theirs,
        1.0,
        total_steps=101,
        pct_start=41 / 101,
        three_phase=True,
        anneal_strategy="linear",
        div_factor=25,
        final_div_factor=1e4,
    )
    for _ in range(100):
        for name in ("lr", "momentum"):
            assert ours.param_groups[0][name] == pytest.approx(theirs.param_groups[0][name], abs=1e-9)
        for part in (ours, theirs, one, two):
            part.step()


def test_betas_are_cycled_and_the_second_kept():
    optimizer = _optimizer("adamw")
    scheduler = OneCycleLR(optimizer, 10, momentum=(0.9, 0.8))
    seen = []
    for _ in range(10):
        seen.append(optimizer.param_groups[0]["betas"])
        optimizer.step()
        scheduler.step()
    assert min(beta for beta, _ in seen) == pytest.approx(0.8, abs=0.02)
    assert {beta for _, beta in seen} == {0.999}


def test_momentum_is_left_alone_when_asked():
    optimizer = _optimizer()
    scheduler = OneCycleLR(optimizer, 10, momentum=None)
    optimizer.step()
    scheduler.step()
    assert optimizer.param_groups[0]["momentum"] == 0.5


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: one_cycle(2), "total must be a whole number of steps, at least 3"),
        (lambda: one_cycle(10, div=0.5), "div must be at least 1"),
        (lambda: one_cycle(10, end=2), r"end must be in \[0, 1\]"),
        (lambda: one_cycle_momentum(10, high=0.8, low=0.9), "low must be at most high"),
        (lambda: OneCycleLR(torch.optim.Adagrad([torch.nn.Parameter(torch.ones(1))]), 10), "no momentum to cycle"),
    ],
)
def test_wrong_use_is_one_line(call, text):
    with pytest.raises(UsageError, match=text):
        call()
