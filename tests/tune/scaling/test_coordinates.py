"""The coordinate check against a loop written out, its verdicts on made-up numbers, and muP's promise itself."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from trimtab.errors import UsageError
from trimtab.tune import coordinate_check, measure_coordinates, read_coordinates


def _build(width):
    return nn.Sequential(
        nn.Linear(6, width), nn.ReLU(inplace=True), nn.Linear(width, width), nn.BatchNorm1d(width), nn.Linear(width, 3)
    )


def _batches(count=2):
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(16, 6, generator=generator), torch.arange(16) % 3) for _ in range(count)]


def _loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def test_equals_a_plain_loop():
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Linear(8, 3))
    other, batches = copy.deepcopy(model), _batches()
    torch.manual_seed(1)
    found = measure_coordinates(model, _loss, batches, torch.optim.SGD(model.parameters(), lr=0.5), 3)
    optimizer, start = torch.optim.SGD(other.parameters(), lr=0.5), None
    torch.manual_seed(1)
    for step in range(4):
        with torch.no_grad():
            first = other[0](batches[0][0])
            middle = torch.relu(first)
            outputs = {"0": first, "1": middle, "3": other[3](middle)}
        start = start or outputs
        for name, x in outputs.items():
            assert found["sizes"][name][step] == pytest.approx(float(x.abs().mean()), rel=1e-6)
            assert found["changes"][name][step] == pytest.approx(float((x - start[name]).abs().mean()), rel=1e-6)
        optimizer.zero_grad()
        loss = _loss(other, batches[step % 2])
        loss.backward()
        optimizer.step()
        if step < 3:
            assert found["losses"][step] == pytest.approx(float(loss.detach()), rel=1e-6)
    assert list(found["sizes"]) == ["0", "1", "3"]


def test_measuring_leaves_the_model_as_it_trains():
    """Batch norm's statistics, modes and dropout's random numbers are those of training alone."""
    model = _build(8)
    other, batches = copy.deepcopy(model), _batches()
    measure_coordinates(model, _loss, batches, torch.optim.SGD(model.parameters(), lr=0.1), 2)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    for batch in batches:
        optimizer.zero_grad()
        _loss(other, batch).backward()
        optimizer.step()
    for (name, left), right in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(left, right), name
    assert not any(module._forward_hooks for module in model.modules())


def _measured(exponents, widths=(10, 100, 1000), seeds=3):
    """Sizes and changes that are powers of the width, by module."""
    return [
        [
            {
                "sizes": {name: [1.0, width**size] for name, (size, _) in exponents.items()},
                "changes": {
                    name: [0.0, None if change is None else 0.0 if change == "none" else (1 + seed) * width**change]
                    for name, (_, change) in exponents.items()
                },
                "losses": [1.0],
            }
            for width in widths
        ]
        for seed in range(seeds)
    ]


def test_slopes_and_verdicts():
    exponents = {
        "level": (0.0, 0.1),
        "larger": (0.0, 0.5),
        "size": (0.4, 0.0),
        "smaller": (-0.5, 0.0),
        "gone": (0.0, -0.5),
        "fixed": (0.0, "none"),
        "lost": (0.0, None),
    }
    found = read_coordinates(_measured(exponents), (10, 100, 1000))
    verdicts = {entry.module: entry.verdict for entry in found.modules}
    assert verdicts == {
        "level": "flat",
        "larger": "grows",
        "size": "grows",
        "smaller": "flat",
        "gone": "vanishes",
        "fixed": "still",
        "lost": "diverged",
    }
    slopes = {entry.module: (entry.size_slope, entry.change_slope) for entry in found.modules}
    for name, (size, change) in exponents.items():
        assert slopes[name][0] == pytest.approx(size, abs=1e-9)
        assert slopes[name][1] == (None if change in (None, "none") else pytest.approx(change, abs=1e-9))
    assert not found.flat
    assert found.verdicts == {"flat": 2, "grows": 2, "vanishes": 1, "still": 1, "diverged": 1}
    assert found.mean("changes", found.modules[1], 100) == pytest.approx(6 ** (1 / 3) * 10)
    assert math.isnan(found.mean("changes", found.modules[6], 100))
    assert read_coordinates(_measured({"level": (0.0, 0.1), "fixed": (0.0, "none")}), (10, 100, 1000)).flat


def test_one_wild_seed_does_not_decide():
    rows = _measured({"level": (0.0, 0.0)})
    rows[0][2]["changes"]["level"][-1] = 1e6
    assert read_coordinates(rows, (10, 100, 1000)).modules[0].verdict == "flat"


@pytest.mark.parametrize(("optimizer", "lr"), [("adam", 0.01), ("sgd", 0.1)])
def test_mup_is_flat_and_standard_grows(optimizer, lr):
    options = {"widths": (32, 64, 128, 256, 512), "lr": lr, "optimizer": optimizer, "seeds": 3, "steps": 4}

    def build(width):
        return nn.Sequential(
            nn.Linear(6, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 3, bias=False)
        )

    mup = coordinate_check(build, _loss, _batches(), **options)
    assert mup.flat, {entry.module: (entry.size_slope, entry.change_slope) for entry in mup.modules}
    standard = coordinate_check(build, _loss, _batches(), parametrization="standard", **options)
    assert not standard.flat
    head = standard.modules[-1]
    # Adam: the change of the output grows in proportion to the width; gradient descent: the output of a network with
    # fan-in initialisation grows likewise with each step of its last layer.
    assert head.verdict == "grows"
    assert head.change_slope > 0.6
    assert len(mup.losses) == 5


def test_a_forgotten_multiplier_is_found():
    """muP's rates without its output multiplier: the output grows."""

    def build(width):
        model = _build(width)
        model[4].register_forward_pre_hook(lambda module, args: (args[0] * width / 32,))
        return model

    found = coordinate_check(build, _loss, _batches(), widths=(32, 64, 128, 256), lr=0.01)
    assert {entry.module: entry.verdict for entry in found.modules}["4"] == "grows"


def test_options_go_to_apply_mup():
    options = {"readout_zero_init": True, "readouts": ["4"]}
    found = coordinate_check(_build, _loss, _batches(), widths=(8, 16, 32), lr=0.01, **options)
    assert all(size[0] == 0 for row in found.modules[-1].sizes for size in row)


def test_is_a_pure_function_and_leaves_the_generator_alone():
    state = torch.get_rng_state()
    one, two = (coordinate_check(_build, _loss, _batches(), widths=(8, 16, 32), lr=0.01) for _ in range(2))
    assert one == two
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"widths": (8, 16)}, "widths must be three or more different ones, at least 1, got 8,16"),
        ({"widths": (8, 8, 16)}, "got 8,8,16"),
        ({"widths": (0, 8, 16)}, "got 0,8,16"),
        ({"widths": ()}, "got none"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"seeds": 0}, "seeds must be at least 1, got 0"),
        ({"tolerance": 0.0}, "tolerance must be above 0"),
        ({"parametrization": "ntk"}, "unknown parametrization 'ntk'"),
        ({"optimizer": "adamw"}, "unknown kind of optimizer 'adamw'"),
        ({"lr": -1.0}, "lr must be above 0"),
        ({"batches": []}, "batches is empty"),
    ],
)
def test_wrong_use_is_one_line(options, text):
    given = {"batches": _batches(), "widths": (8, 16, 32), "lr": 0.01, **options}
    with pytest.raises(UsageError, match=text) as caught:
        coordinate_check(_build, _loss, **given)
    assert "\n" not in str(caught.value)
