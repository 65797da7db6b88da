"""1cycle: corners, straight lines, momentum mirrored, torch's three-phase form, and the search for a weight decay."""

from __future__ import annotations

import math

import pytest
import torch

from trimtab.errors import UsageError
from trimtab.schedule import OneCycleLR, one_cycle, one_cycle_momentum, weight_decay_advice
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


@pytest.mark.parametrize("exponent", [-1.3, -2.7, -3.4, -4.0, -4.6, -6.2])
@pytest.mark.parametrize("model", ["shallow", "unknown", "deep"])
def test_weight_decay_is_found_by_halving_exponents(exponent, model):
    """Losses with one minimum, at 10^exponent: the search ends within a quarter of a decade of it."""

    def loss(decay):
        return abs(math.log10(decay) - exponent) if decay else 30.0

    losses = {}
    for _ in range(12):
        advice = weight_decay_advice(losses, model=model)
        assert list(advice.next) == sorted(advice.next, reverse=True)
        assert not set(advice.next) & set(losses)
        losses |= {decay: loss(decay) for decay in advice.next}
        if not advice.next:
            break
    assert not advice.next
    assert abs(math.log10(advice.best) - exponent) <= 0.2501


def test_no_weight_decay_can_be_the_best():
    losses = {1e-3: 3.0, 1e-4: math.nan, 1e-5: 2.0, 0.0: 1.0}
    advice = weight_decay_advice(losses)
    assert (advice.best, advice.next) == (0.0, (pytest.approx(1e-6),))
    losses |= {1e-6: 1.5, 1e-7: 1.4}
    assert weight_decay_advice(losses).next == ()
    assert weight_decay_advice({0.0: 1.0}).next == (1e-3, 1e-4, 1e-5)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: one_cycle(2), "total must be a whole number of steps, at least 3"),
        (lambda: one_cycle(10, div=0.5), "div must be at least 1"),
        (lambda: one_cycle(10, end=2), r"end must be in \[0, 1\]"),
        (lambda: one_cycle_momentum(10, high=0.8, low=0.9), "low must be at most high"),
        (lambda: weight_decay_advice({-1e-3: 1.0}), "weight decays must be at least 0 and finite, got -0.001"),
        (lambda: weight_decay_advice({1e-3: math.nan}), "no loss is finite"),
        (lambda: weight_decay_advice(model="wide"), "unknown model 'wide'"),
        (lambda: weight_decay_advice(finest=1), "finest must be above 1"),
        (lambda: OneCycleLR(torch.optim.Adagrad([torch.nn.Parameter(torch.ones(1))]), 10), "no momentum to cycle"),
    ],
)
def test_wrong_use_is_one_line(call, text):
    with pytest.raises(UsageError, match=text):
        call()
