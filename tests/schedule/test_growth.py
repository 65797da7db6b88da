"""Growth: a change into the same model is none, states go along by name and shape, and runs resume exactly."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

from trimtab.errors import UsageError
from trimtab.optim import SPAM
from trimtab.schedule import GrowthSchedule, VCycle, carry_state, pre_ln_layout
from trimtab.workloads.lm import LanguageModel


class _Stack(nn.Module):
    """Residual blocks, so that one more block with a zero last layer is the same function."""

    def __init__(self, depth, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(depth))
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x.tanh())
        return self.head(x)


def _deeper(model):
    grown = _Stack(len(model.blocks) + 1, seed=9)
    nn.init.zeros_(grown.blocks[-1].weight)
    nn.init.zeros_(grown.blocks[-1].bias)
    grown.load_state_dict(model.state_dict(), strict=False)
    return grown


def _adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)


def _train(schedule, model, optimizer, steps):
    for _ in range(steps):
        model, optimizer = schedule.step(model, optimizer)
        generator = torch.Generator().manual_seed(schedule.steps)
        optimizer.zero_grad()
        model(torch.randn(8, 4, generator=generator)).square().mean().backward()
        optimizer.step()
    return model, optimizer


@pytest.mark.parametrize(
    "make",
    [
        _adamw,
        lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        lambda model: SPAM(model.parameters(), lr=0.01, interval=6, warmup=2),
    ],
    ids=["adamw", "sgd", "spam"],
)
def test_growing_into_the_same_model_changes_nothing(make):
    plain, copied = (_Stack(2) for _ in range(2))
    one, _ = _train(GrowthSchedule({}, make), plain, make(plain), 10)
    schedule = GrowthSchedule({3: copy.deepcopy, 7: copy.deepcopy}, make)
    two, _ = _train(schedule, copied, make(copied), 10)
    assert two is not copied
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b)
    restarted = _Stack(2)
    three, _ = _train(GrowthSchedule({3: copy.deepcopy}, make, carry=False), restarted, make(restarted), 10)
    assert not torch.equal(one.head.weight, three.head.weight)


def test_state_is_kept_where_names_and_shapes_agree():
    old, new = _Stack(2), _Stack(3)
    new.head = nn.Linear(4, 5)
    optimizer, fresh = _adamw(old), torch.optim.AdamW(new.parameters(), lr=0.5)
    old(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    kept = carry_state(old, optimizer, new, fresh)
    assert kept == ("blocks.0.weight", "blocks.0.bias", "blocks.1.weight", "blocks.1.bias")
    for name, parameter in new.named_parameters():
        if name not in kept:
            assert parameter not in fresh.state
            continue
        before = optimizer.state[old.get_parameter(name)]
        assert fresh.state[parameter].keys() == before.keys()
        for key, value in before.items():
            assert torch.equal(value, fresh.state[parameter][key])
            assert value.data_ptr() != fresh.state[parameter][key].data_ptr()
    assert (fresh.param_groups[0]["lr"], fresh.param_groups[0]["weight_decay"]) == (0.01, 0.1)


def test_a_grown_model_is_the_same_function_and_trains_on():
    schedule, model = GrowthSchedule({5: _deeper}, _adamw), _Stack(2)
    model, optimizer = _train(schedule, model, _adamw(model), 5)
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    before = model.eval()(x)
    grown, fresh = schedule.step(model, optimizer)
    assert torch.equal(grown(x), before)
    assert not grown.training
    assert fresh.state[grown.head.weight]["step"] == 5
    assert grown.blocks[2].weight not in fresh.state
    _train(schedule, grown, fresh, 3)
    assert grown.blocks[2].weight.abs().max() > 0


@pytest.mark.parametrize("at", [2, 4, 5, 9])
def test_resumes_exactly_before_and_after_a_growth(at):
    def fresh():
        return GrowthSchedule({4: _deeper, 8: _deeper}, _adamw), _Stack(1)

    schedule, model = fresh()
    whole, _ = _train(schedule, model, _adamw(model), 12)
    schedule, model = fresh()
    parts = [schedule, *_train(schedule, model, _adamw(model), at)]
    file = io.BytesIO()
    torch.save([part.state_dict() for part in parts], file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    schedule, model = fresh()
    schedule.load_state_dict(saved[0])
    model, optimizer = schedule.restore(model)
    model.load_state_dict(saved[1])
    optimizer.load_state_dict(saved[2])
    resumed, _ = _train(schedule, model, optimizer, 12 - at)
    assert len(resumed.blocks) == 3
    for one, two in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, two)


def test_drives_a_cycle():
    def large():
        torch.manual_seed(0)
        return LanguageModel(16, 8, 4, 4)

    cycle = VCycle(pre_ln_layout(), lambda: LanguageModel(8, 8, 2, 2), large)
    schedule = GrowthSchedule({1: cycle.down, 3: cycle.up}, _adamw)
    model = large()
    optimizer = _adamw(model)
    widths = []
    for _ in range(5):
        model, optimizer = schedule.step(model, optimizer)
        model(torch.zeros(1, 8, dtype=torch.long)).sum().backward()
        optimizer.step()
        widths.append(model.embedding.embedding_dim)
    assert widths == [16, 8, 8, 16, 16]


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: GrowthSchedule({-1: _deeper}, _adamw), "growths must map steps, at least 0, to functions"),
        (lambda: GrowthSchedule({1: "deeper"}, _adamw), "got 1: 'deeper'"),
        (
            lambda: carry_state(_Stack(1), _adamw(_Stack(1)), _Stack(1), torch.optim.SGD(_Stack(1).parameters())),
            "only carried between optimizers of one class, got AdamW and SGD",
        ),
    ],
)
def test_wrong_use_is_one_line(call, text):
    with pytest.raises(UsageError, match=text):
        call()
