"""The first non-finite value of a run is found where it arises, not where it shows."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from trimtab.record import Run
from trimtab.watch import Watch


class Chain(nn.Module):
    """Three layers of which the middle one can be made to fail."""

    def __init__(self):
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 1)
        self.broken = False

    def forward(self, x):
        x = self.middle(self.first(x))
        return self.last(x.log() if self.broken else x)


def poisoned(how, tmp_path):
    torch.manual_seed(0)
    model = Chain()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with Watch(model, optimizer, to=tmp_path) as watch:
        for step in range(5):
            x = torch.ones(2, 3)
            if step == 3:
                if how == "input":
                    x[0, 0] = float("inf")
                elif how == "parameter":
                    with torch.no_grad():
                        model.middle.bias[1] = float("nan")
                elif how == "overflow":
                    with torch.no_grad():
                        model.middle.weight.fill_(3e38)
                        model.first.bias.fill_(10.0)
            out = model(x)
            loss = (out * float("nan")).sum() if how == "loss" and step == 3 else out.square().sum()
            if how == "gradient" and step == 3:
                model.middle.weight.register_hook(lambda gradient: gradient * float("inf"))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            watch.step(loss)
    with Run(tmp_path) as run:
        return run.events("non-finite")


@pytest.mark.parametrize(
    ("how", "tensor", "name"),
    [
        ("input", "input", "input"),
        ("parameter", "parameter", "middle.bias"),
        ("overflow", "output", "middle"),
        ("gradient", "gradient", "middle.weight"),
        ("loss", "loss", "loss"),
    ],
)
def test_the_first_non_finite_tensor_is_named(how, tensor, name, tmp_path):
    events = poisoned(how, tmp_path)
    assert len(events) == 1
    assert events[0].step == 3
    assert (events[0].data["tensor"], events[0].data["name"]) == (tensor, name)


def scaled_run(folder, scales):
    """Train under loss scales of which some overflow; a step that overflows is skipped, as a loss scaler does."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with Watch(model, optimizer, to=folder) as watch:
        for scale in scales:
            loss = model(torch.ones(2, 3)).square().sum()
            (loss * scale).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            if scale == 1.0:
                optimizer.step()
            optimizer.zero_grad()
            watch.step(loss)
    with Run(folder) as run:
        return run.events("non-finite")


def test_an_overflowing_backward_is_not_blamed_on_the_loss(tmp_path):
    events = scaled_run(tmp_path, [float("inf"), 1.0, 1.0])
    assert [(event.step, event.data["tensor"], event.data["name"]) for event in events] == [
        (0, "gradient", "every parameter")
    ]


def test_each_stretch_of_non_finite_steps_is_located_once(tmp_path):
    bad = float("inf")
    assert [event.step for event in scaled_run(tmp_path / "a", [1.0, bad, bad, 1.0, bad, 1.0])] == [1, 4]
    assert len(scaled_run(tmp_path / "b", [bad, 1.0] * 30)) == 20
