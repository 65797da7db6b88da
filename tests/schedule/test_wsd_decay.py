"""WSD: its closed form, and branches that continue a checkpoint as if they had been meant to."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from trimtab.errors import UsageError
from trimtab.schedule import ScheduleLR, wsd
from trimtab.testing import ScheduleTestCase


class TestWSD(ScheduleTestCase):
    @staticmethod
    def schedule():
        return wsd(60, warmup=6, decay=12)


@pytest.mark.parametrize(
    ("form", "floor", "middle"),
    [
        ("linear", 0.0, 0.5),
        ("linear", 0.2, 0.6),
        ("1-sqrt", 0.0, 1 - math.sqrt(0.5)),
        ("cosine", 0.0, 0.5),
        ("exponential", 0.25, 0.5),
    ],
)
def test_closed_form(form, floor, middle):
    schedule = wsd(100, warmup=9, decay=20, form=form, floor=floor)
    assert [schedule(step) for step in (0, 4, 9, 50, 79, 80)] == pytest.approx([0.1, 0.5, 1, 1, 1, 1])
    assert schedule(90) == pytest.approx(middle)
    assert schedule(100) == pytest.approx(floor)
    assert schedule(10_000) == schedule(100)


def test_without_decay_it_stays_constant_for_ever():
    assert wsd(10, decay=0)(1000) == 1.0


def _run(model, optimizer, scheduler, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        (model(torch.ones(3, 4)) - 1).square().mean().backward()
        optimizer.step()
        scheduler.step()


def test_a_branch_continues_a_checkpoint_exactly():
    """The branch equals a run that was planned so from the start, and the trunk equals one that never branched."""

    def fresh(schedule):
        torch.manual_seed(0)
        model = nn.Linear(4, 2)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        return model, optimizer, ScheduleLR(optimizer, schedule)

    long = wsd(40, warmup=4, decay=8)
    trunk = fresh(long)
    _run(*trunk, 20)
    saved = [part.state_dict() for part in trunk]
    saved = torch.utils._pytree.tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, saved)

    early = long.branch(20, decay=6)
    branch = fresh(early)
    for part, state in zip(branch, saved, strict=True):
        part.load_state_dict(state)
    _run(*branch, 6)
    planned = fresh(early)
    _run(*planned, 26)
    _run(*trunk, 20)
    straight = fresh(long)
    _run(*straight, 40)
    for one, two in ((branch, planned), (trunk, straight)):
        assert all(torch.equal(x, y) for x, y in zip(one[0].parameters(), two[0].parameters(), strict=True))
        assert one[1].param_groups[0]["lr"] == two[1].param_groups[0]["lr"]


def test_a_branch_keeps_form_and_floor_unless_told():
    schedule = wsd(100, decay=10, form="linear", floor=0.5)
    assert schedule.branch(30, decay=10)(35) == 0.75
    assert schedule.branch(30, decay=10, floor=0.0)(35) == 0.5
    assert schedule.branch(30, decay=10, form="1-sqrt")(35) == pytest.approx(0.5 + 0.5 * (1 - math.sqrt(0.5)))


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: wsd(10, warmup=6, decay=5), "warmup 6 [+] decay 5 is more than the 10 steps"),
        (lambda: wsd(10, form="square"), "unknown form 'square'"),
        (lambda: wsd(10, form="exponential"), "never reaches 0"),
        (lambda: wsd(100, warmup=10, decay=20).branch(5, 10), "stable phase, steps 10 to 80, got 5"),
        (lambda: wsd(100, warmup=10, decay=20).branch(81, 10), "stable phase, steps 10 to 80, got 81"),
        (lambda: wsd(100).branch(50, 0), "decay must be a whole number of steps, at least 1"),
    ],
)
def test_wrong_use_is_one_line(call, text):
    with pytest.raises(UsageError, match=text):
        call()
