"""The range test: its ramp and losses by a plain loop, what it reads from them, and what it refuses."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from torch import nn

from trimtab.errors import UsageError
from trimtab.optim import AdamW
from trimtab.tune import lr_range_test


def _problem(seed=0, batches=7):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1))
    data = [(torch.randn(16, 5), torch.randn(16, 1)) for _ in range(batches)]
    return model, data


def _loss(model, batch):
    inputs, targets = batch
    return (model(inputs) - targets).square().mean()


def _plain_loop(model, optimizer, data, rates, accumulate=1, clip=0.0):
    """One rate after the other, with nothing but torch."""
    losses, place = [], 0
    for lr in rates:
        optimizer.param_groups[0]["lr"] = lr
        optimizer.zero_grad()
        parts = []
        for _ in range(accumulate):
            loss = _loss(model, data[place % len(data)])
            (loss / accumulate).backward()
            parts.append(float(loss.detach()))
            place += 1
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        losses.append(sum(part / accumulate for part in parts))
    return losses


@pytest.mark.parametrize("mode", ["exponential", "linear"])
@pytest.mark.parametrize(
    ("accumulate", "clip", "scaled"), [(1, 0.0, False), (3, 0.0, False), (1, 0.1, False), (2, 0.1, True)]
)
def test_equals_a_plain_loop(mode, accumulate, clip, scaled):
    steps, low, high = 12, 1e-3, 0.2
    ratio = (high / low) ** (1 / (steps - 1))
    ramp = {
        "exponential": [low * ratio**i for i in range(steps)],
        "linear": [low + (high - low) * i / (steps - 1) for i in range(steps)],
    }[mode]
    model, data = _problem()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0) if scaled else None
    optimizer = torch.optim.SGD(model.parameters(), lr=7.0, momentum=0.9)
    options = {"lowest": low, "highest": high, "steps": steps, "mode": mode, "smoothing": 0.25, "diverges_at": 1e9}
    found = lr_range_test(model, optimizer, _loss, data, accumulate=accumulate, clip=clip, scaler=scaler, **options)
    model, data = _problem()
    expected = _plain_loop(
        model, torch.optim.SGD(model.parameters(), lr=7.0, momentum=0.9), data, ramp, accumulate, clip
    )
    assert found.lrs == pytest.approx(ramp, rel=1e-12)
    assert (found.lrs[0], found.lrs[-1]) == (low, high)
    assert found.losses == pytest.approx(expected, rel=1e-6)
    smooth = [expected[0]]
    for loss in expected[1:]:
        smooth.append(0.25 * loss + 0.75 * smooth[-1])
    assert found.smoothed == pytest.approx(smooth, rel=1e-6)
    assert found.stopped_because == "finished"


def test_batches_accumulate_to_one_large_batch():
    model, data = _problem(batches=8)
    halves = [(x[part], y[part]) for x, y in data for part in (slice(0, 8), slice(8, 16))]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options = {"lowest": 1e-3, "highest": 1.0, "steps": 20}
    one = lr_range_test(model, optimizer, _loss, data, **options)
    two = lr_range_test(model, optimizer, _loss, halves, accumulate=2, **options)
    assert one.losses == pytest.approx(two.losses, rel=1e-5)


def _quadratic(curvature, steps=200):
    """Loss curvature (x - 1)^2 / 2: gradient descent contracts up to 2 / curvature, and no further."""
    x = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    holder = nn.ParameterList([x])
    optimizer = torch.optim.SGD([x], lr=1.0)
    return lr_range_test(
        holder,
        optimizer,
        lambda model, _: 0.5 * curvature * (model[0] - 1).square().sum(),
        [None],
        lowest=1e-6 / curvature,
        highest=1e3 / curvature,
        steps=steps,
    )


def test_reads_the_edge_of_stability_of_a_quadratic():
    found = _quadratic(5.0)
    assert found.stopped_because == "diverged"
    assert 0.1 / 5.0 < found.largest_stable < 4.0 / 5.0, "where it starts to diverge is 2 / curvature"
    assert 0.005 / 5.0 < found.suggestion < found.largest_stable
    scaled = _quadratic(5000.0)
    assert scaled.suggestion == pytest.approx(found.suggestion / 1000, rel=1e-9)
    assert scaled.largest_stable == pytest.approx(found.largest_stable / 1000, rel=1e-9)


def test_finds_the_place_of_the_steepest_descent():
    """Losses that are given: a fall of known place, on a noisy line, and a blow-up."""
    random = np.random.default_rng(0)
    logs = np.linspace(-6, 1, 141)
    curve = 2 - 1.5 / (1 + np.exp(-(logs + 3) * 4)) + np.exp(6 * (logs - 0.2)) + 0.02 * random.normal(size=141)
    found = _given(list(curve), lowest=1e-6, steps=141)
    assert found.stopped_because == "diverged"
    assert abs(math.log10(found.suggestion) + 3) < 0.4
    assert -2.5 < math.log10(found.largest_stable) < 0.2
    assert found.reason == ""


def _given(losses, *, lowest=1e-7, steps=100, **options):
    """Run on losses that do not depend on the rate."""
    weight = nn.Parameter(torch.zeros(()))
    values = iter(losses)
    holder = nn.ParameterList([weight])
    optimizer = torch.optim.SGD([weight], lr=1.0)
    return lr_range_test(
        holder, optimizer, lambda model, _: model[0] * 0 + next(values), [0], lowest=lowest, steps=steps, **options
    )


@pytest.mark.parametrize("seed", range(20))
def test_suggests_nothing_from_noise(seed):
    random = np.random.default_rng(seed)
    found = _given(list(2 + 0.3 * random.normal(size=100)))
    assert (found.suggestion, found.largest_stable) == (None, None)
    assert found.reason.startswith("the loss fell by")
    assert "not more than noise" in found.reason


@pytest.mark.parametrize("seed", range(20))
def test_sees_a_fall_in_the_same_noise(seed):
    random = np.random.default_rng(seed)
    found = _given(list(2 - np.clip(np.arange(100) - 40, 0, 40) / 40 + 0.3 * random.normal(size=100)))
    assert found.suggestion is not None
    assert found.lrs[35] < found.suggestion < found.lrs[90]


def test_other_refusals_say_why():
    assert "not more than noise" in _given([2.0] * 100).reason
    assert "not more than noise" in _given(list(np.linspace(1, 3, 100))).reason
    assert "not more than noise" in _given(list(np.linspace(2, 1.99, 100))).reason, "a fall of half a per cent"
    short = _given([2.0] * 5 + [math.nan] * 95)
    assert (short.stopped_because, len(short.losses), short.suggestion) == ("non-finite", 5, None)
    assert short.reason == "stopped after 5 steps (non-finite): give a smaller lowest rate."
    nothing = _given([math.inf])
    assert (nothing.lrs, nothing.suggestion) == ((), None)


def test_says_when_the_range_ends_too_early():
    found = _given(list(np.linspace(3, 1, 100)))
    assert found.stopped_because == "finished"
    assert found.suggestion is not None
    assert "still falling at the highest rate" in found.reason


def test_stops_where_it_should():
    blown = _given([2.0] * 50 + [1.0] * 20 + [500.0] * 30)
    assert (blown.stopped_because, len(blown.losses)) == ("diverged", 71)
    assert _given([2.0] * 50 + [1.0] * 20 + [500.0] * 30, diverges_at=1e3).stopped_because == "finished"
    below = [-1.0] * 50 + [-4.0] * 40
    assert _given([*below, *[-3.0] * 10]).stopped_because == "finished", "losses below 0 are losses"
    assert _given([*below, *[900.0] * 10]).stopped_because == "diverged"


def test_nan_in_the_middle_stops_before_its_step():
    calls = []

    def loss(model, batch):
        calls.append(model.weight.detach().clone())
        value = (model(batch) - 1).square().mean()
        return value * (math.nan if len(calls) == 15 else 1.0)

    model = nn.Linear(3, 1)
    before = model.weight.detach().clone()
    found = lr_range_test(model, torch.optim.SGD(model.parameters(), lr=1.0), loss, [torch.ones(2, 3)], highest=0.1)
    assert (found.stopped_because, len(found.losses), len(calls)) == ("non-finite", 14, 15)
    assert torch.equal(model.weight, before)


def test_a_gradient_that_the_optimizer_refuses_ends_the_test():
    model = nn.Linear(3, 1)
    calls = []

    def loss(net, batch):
        calls.append(1)
        value = net(batch).sum()
        if len(calls) == 13:
            value.register_hook(lambda gradient: gradient * math.inf)
        return value + 10

    found = lr_range_test(model, AdamW(model.parameters(), nonfinite="raise"), loss, [torch.ones(2, 3)], highest=1e-3)
    assert (found.stopped_because, len(found.losses)) == ("non-finite", 12)


def test_groups_keep_the_ratio_of_their_rates():
    model, data = _problem()
    optimizer = torch.optim.SGD(
        [{"params": model[0].parameters(), "lr": 0.01}, {"params": model[2].parameters(), "lr": 0.1}]
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda step: 0.25, lambda step: 0.5])
    seen = []

    def loss(net, batch):
        seen.append([group["lr"] for group in optimizer.param_groups])
        return _loss(net, batch)

    found = lr_range_test(model, optimizer, loss, data, scheduler=scheduler, lowest=1e-4, highest=1e-2, steps=10)
    assert [rates[1] for rates in seen] == list(found.lrs)
    assert [rates[0] for rates in seen] == pytest.approx([lr / 10 for lr in found.lrs])
    assert [group["lr"] for group in optimizer.param_groups] == [0.0025, 0.05]


def test_json_is_strict():
    found = _given([2.0] * 20 + [1.0] * 30 + [math.nan] * 50)
    assert json.loads(json.dumps(found.to_json(), allow_nan=False))["stopped_because"] == "non-finite"


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"lowest": 0.0}, "rates must rise from above 0, got lowest 0.0"),
        ({"lowest": 1.0, "highest": 1.0}, "rates must rise"),
        ({"highest": math.inf}, "rates must rise"),
        ({"highest": math.nan}, "rates must rise"),
        ({"steps": 9}, "steps must be a whole number, at least 10, got 9"),
        ({"steps": 20.0}, "steps must be a whole number"),
        ({"mode": "exp"}, "unknown mode 'exp'"),
        ({"smoothing": 0.0}, r"smoothing must be in \(0, 1\], got 0.0"),
        ({"diverges_at": 1.0}, "diverges_at must be above 1, got 1.0"),
        ({"accumulate": 0}, "accumulate must be a whole number, at least 1, got 0"),
        ({"clip": -1.0}, "clip must be at least 0"),
        ({"loader": []}, "the loader is empty"),
        ({"loader": iter([1])}, "iterated only once"),
        ({"loss_fn": lambda model, batch: 1.0}, "tensor of one element"),
        ({"loss_fn": lambda model, batch: model.weight}, "tensor of one element"),
        ({"loss_fn": lambda model, batch: torch.ones(())}, "depends on the model's parameters"),
    ],
)
def test_wrong_use_is_one_line(options, text):
    model = nn.Linear(2, 1)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    given = {"loss_fn": lambda net, batch: net(torch.ones(1, 2)).sum(), "loader": [0], **options}
    with pytest.raises(UsageError, match=text) as raised:
        lr_range_test(model, optimizer, given.pop("loss_fn"), given.pop("loader"), **given)
    assert "\n" not in str(raised.value)
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_optimizers_that_it_cannot_drive_are_refused():
    model = nn.Linear(2, 1)
    with pytest.raises(UsageError, match="LBFGS needs a closure"):
        lr_range_test(model, torch.optim.LBFGS(model.parameters()), _loss, [0])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    del optimizer.param_groups[0]["lr"]
    with pytest.raises(UsageError, match="SGD has no learning rate"):
        lr_range_test(model, optimizer, _loss, [0])
