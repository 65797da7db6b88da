"""Layer freezing: the schedule in plain loops, what stays untouched, exact resumption, and the memory it spares."""

from __future__ import annotations

import copy
import io
import itertools

import numpy as np
import pytest
import torch
from torch import nn

from trimtab.errors import UsageError
from trimtab.optim import SPAM
from trimtab.schedule import LayerFreezing


def _model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(6, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8), nn.Linear(8, 3)
    ).double()


def _batch(step):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(16, 6, dtype=torch.float64, generator=generator), torch.randint(3, (16,), generator=generator)


def _train(model, optimizer, freezing, first, last, log=None):
    for step in range(first, last):
        if log is not None:
            log.append((freezing.frozen, copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())))
        inputs, targets = _batch(step)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
        freezing.step()


@pytest.mark.parametrize("distance", ["elementwise", "norm"])
def test_equals_the_schedule_in_plain_loops(distance):
    model, log = _model(), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    freezing = LayerFreezing(model, optimizer, rate=0.6, distance=distance, seed=1)
    layers = ["0.weight", "1.weight", "3.weight", "5.weight", "6.weight"]
    assert sorted(freezing.distances) == layers
    _train(model, optimizer, freezing, 0, 12, log)
    log.append((freezing.frozen, model.state_dict(), None))
    distances = dict.fromkeys(layers, np.inf)
    for (frozen, before, _), (next_frozen, after, _) in itertools.pairwise(log):
        assert len(frozen) == 3
        for name in layers:
            if name in frozen:
                assert torch.equal(before[name], after[name])
                continue
            old, new = before[name].numpy(), after[name].numpy()
            if distance == "norm":
                distances[name] = np.sqrt(((new - old) ** 2).sum()) / np.sqrt((old**2).sum())
            else:
                distances[name] = sum(abs((n - o) / o) for n, o in zip(new.flat, old.flat, strict=True)) / new.size
        known = {name: value for name, value in distances.items() if np.isfinite(value)}
        # Those that were never trained come last, whatever their order; of the others, the least moved are frozen.
        expected = sorted(known, key=known.get)[:3]
        assert set(next_frozen) >= set(expected)
        assert len(next_frozen) == 3
    assert freezing.distances == pytest.approx(distances)
    assert np.isfinite(list(distances.values())).all()


@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.SGD, SPAM], ids=lambda make: make.__name__)
def test_frozen_weights_and_their_states_stay(make):
    model, log = _model(), []
    options = {"momentum": 0.9} if make is torch.optim.SGD else {}
    optimizer = make(model.parameters(), lr=0.01, weight_decay=0.1, **options)
    with LayerFreezing(model, optimizer, rate=0.5) as freezing:
        _train(model, optimizer, freezing, 0, 8, log)
        names = [name for name, _ in model.named_parameters()]
        for (frozen, weights, state), (_, later_weights, later_state) in itertools.pairwise(log):
            assert len(frozen) == 2
            for name in names:
                assert torch.equal(weights[name], later_weights[name]) == (name in frozen), name
                index = names.index(name)
                if name in frozen and index in state["state"]:
                    for key, value in state["state"][index].items():
                        same = later_state["state"][index][key]
                        assert torch.equal(torch.as_tensor(value), torch.as_tensor(same)), (name, key)
        assert all(model.get_parameter(name).grad is None for name in freezing.frozen)
        assert not any(model.get_parameter(name).requires_grad for name in freezing.frozen)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_resumes_exactly():
    def fresh():
        model = _model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        return model, optimizer, LayerFreezing(model, optimizer, rate=lambda step: 0.4 if step < 6 else 0.8, seed=3)

    whole = fresh()
    _train(*whole, 0, 14)
    parts = fresh()
    _train(*parts, 0, 5)
    file = io.BytesIO()
    torch.save([part.state_dict() for part in parts], file)
    file.seek(0)
    resumed = fresh()
    for part, state in zip(resumed, torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(state)
    _train(*resumed, 5, 14)
    for one, two in zip(whole[0].parameters(), resumed[0].parameters(), strict=True):
        assert torch.equal(one, two)
    assert whole[2].state_dict() == resumed[2].state_dict()
    assert len(whole[2].frozen) == 4


def test_saves_no_inputs_for_frozen_layers():
    """A linear layer keeps its input for the gradient of its weight only: frozen, that memory is spared."""
    layers = [nn.Linear(64, 64, bias=False) for _ in range(10)]
    model = nn.Sequential(*layers)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def saved():
        seen = {}

        def pack(tensor):
            if tensor.shape == (256, 64):
                seen[tensor.data_ptr()] = tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            x = torch.ones(256, 64, requires_grad=True)
            model(x).sum().backward()
        return sum(seen.values())

    everything = saved()
    with LayerFreezing(model, optimizer, rate=0.8):
        assert saved() == 0.2 * everything
    assert saved() == everything


def test_kept_and_untrained_weights_are_never_frozen():
    model = _model()
    model[3].weight.requires_grad_(False)
    optimizer = torch.optim.SGD([*model[0].parameters(), *model[3:].parameters()], lr=0.1)
    freezing = LayerFreezing(model, optimizer, rate=0.99, keep=("6.*",))
    assert sorted(freezing.distances) == ["0.weight", "5.weight"]
    freezing.close()
    assert not model[3].weight.requires_grad


def test_a_weight_at_zero_that_stays_has_not_moved():
    model = nn.Sequential(nn.Linear(2, 1, bias=False), nn.Linear(1, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[0.0, 2.0]]))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    freezing = LayerFreezing(model, optimizer, rate=0.0)
    model(torch.tensor([[0.0, 1.0]])).sum().backward()
    moved = 0.5 * model[1].weight.detach().abs().item() / 2
    optimizer.step()
    freezing.step()
    assert freezing.distances["0.weight"] == pytest.approx(moved / 2)


def test_a_layer_at_zero_that_stays_has_distance_0_in_the_norm_too():
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False))
    nn.init.zeros_(model[0].weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    freezing = LayerFreezing(model, optimizer, rate=0.5, distance="norm")
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.zeros(1, 2)).sum().backward()
        optimizer.step()
        freezing.step()
    assert freezing.distances == {"0.weight": 0.0, "1.weight": 0.0}


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"rate": 1.0}, r"rate must be in \[0, 1\), got 1.0 at step 0"),
        ({"rate": lambda step: -1}, r"rate must be in \[0, 1\), got -1"),
        ({"distance": "cosine"}, "unknown distance 'cosine'"),
        ({"keep": ["*"]}, "there are no layers to freeze"),
    ],
)
def test_wrong_use_is_one_line(options, text):
    model = _model()
    with pytest.raises(UsageError, match=text):
        LayerFreezing(model, torch.optim.SGD(model.parameters(), lr=0.1), **options)


def test_a_state_of_other_layers_is_refused():
    model, other = _model(), nn.Linear(2, 2)
    state = LayerFreezing(other, torch.optim.SGD(other.parameters(), lr=0.1)).state_dict()
    with pytest.raises(UsageError, match="the saved state is of other layers"):
        LayerFreezing(model, torch.optim.SGD(model.parameters(), lr=0.1)).load_state_dict(state)
