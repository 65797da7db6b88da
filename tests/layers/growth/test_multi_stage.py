"""Multi-stage networks: each stage against plain NumPy, the residual's size and zeros, and that errors fall."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch

from trimtab.errors import UsageError
from trimtab.layers import MultiStageNetwork, StageNetwork, fit_multi_stage, residual_scale


def _generator(seed=7):
    return torch.Generator().manual_seed(seed)


def _column(count=60, low=-1.0, high=1.0):
    return torch.linspace(low, high, count, dtype=torch.float64)[:, None]


@pytest.mark.parametrize("sine", [True, False])
def test_stage_equals_the_authors_network(sine):
    stage = StageNetwork(5, 3, low=-2.0, high=4.0, kappa=7.5, size=0.3, sine=sine, generator=_generator())
    for layer in stage.layers:
        torch.nn.init.normal_(layer.bias, generator=_generator(1))
    x = _column(low=-2.0, high=4.0)
    weights = [(layer.weight.detach().numpy().T, layer.bias.detach().numpy()) for layer in stage.layers]
    h = 2 * (x.numpy() + 2) / 6 - 1
    (w, b), *middle, (last, offset) = weights
    h = (np.sin if sine else np.tanh)(7.5 * (h @ w) + b)
    for w, b in middle:
        h = np.tanh(h @ w + b)
    np.testing.assert_allclose(stage(x).detach().numpy(), 0.3 * (h @ last + offset), rtol=1e-10, atol=1e-14)
    stds = [math.sqrt(2 / sum(layer.weight.shape)) for layer in stage.layers]
    assert all(layer.weight.abs().max() <= 2 * std for layer, std in zip(stage.layers, stds, strict=True))


@pytest.mark.parametrize("cycles", [1, 5, 13])
def test_size_and_zeros_of_a_wave(cycles):
    x = _column(997)
    wave = 3e-5 * (cycles * math.pi * x + 0.3).sin()
    size, zeros = residual_scale(x, wave)
    assert (size, zeros) == (pytest.approx(1.5e-5, rel=1e-2), 2 * cycles)
    shuffled = torch.randperm(len(x), generator=_generator())
    assert residual_scale(x[shuffled], wave[shuffled]) == (size, zeros)
    small = residual_scale(x.float(), (1e-30 * wave).float())  # whose products are 0 in float32
    assert small == (pytest.approx(1.5e-35, rel=1e-2), 2 * cycles)


def test_a_sample_at_a_zero_is_one_crossing():
    x = torch.linspace(-1, 1, 5)
    assert residual_scale(x, x) == (0.5, 1)
    assert residual_scale(x, x.square()) == (0.5, 0)


def test_stages_fit_residuals():
    """Every report is that of the sum of the stages before it, and each stage lowers the error."""
    x = _column()
    y = (3 * x).sin() + 0.2 * (1.3 * x).exp()
    network, reports = fit_multi_stage(
        x, y, stages=3, width=10, depth=2, adam_steps=60, lbfgs_steps=120, generator=_generator()
    )
    residual, scale = y.numpy(), np.sqrt((y.numpy() ** 2).mean())
    for i, (stage, report) in enumerate(zip(network.stages, reports, strict=True)):
        crossings = int((residual[:-1] * residual[1:] < 0).sum())
        assert report.size == pytest.approx(np.abs(residual).max() / 2, rel=1e-9)
        assert report.zeros == crossings
        assert (report.kappa, stage.kappa) == ((1.0, 1.0) if i == 0 else (3.0 * crossings, 3.0 * crossings))
        assert stage.sine == (i > 0)
        residual = residual - stage(x).detach().numpy()
        assert report.error == pytest.approx(np.sqrt((residual**2).mean()) / scale, rel=1e-6)
    errors = [report.error for report in reports]
    assert errors[1] < 0.1 * errors[0]
    assert errors[2] < 0.5 * errors[1]
    np.testing.assert_allclose((y - network(x)).detach().numpy(), residual, atol=1e-12)


def test_deterministic_and_saved():
    x = _column()

    def fitted(**options):
        return fit_multi_stage(
            x, x.cos(), stages=2, width=4, depth=1, adam_steps=[5, 7], lbfgs_steps=3, generator=_generator(), **options
        )[0]

    first, second = fitted(), fitted()
    assert torch.equal(first(x), second(x))
    assert all(p.grad is None for p in first.parameters())
    blank = MultiStageNetwork([StageNetwork(4, 1, low=0.0, high=1.0, kappa=s.kappa, sine=s.sine) for s in first.stages])
    blank.load_state_dict(first.state_dict())
    assert torch.equal(blank(x), first(x))
    assert torch.equal(copy.deepcopy(first)(x), first(x))
    assert not torch.equal(fitted(kappa_per_zero=1.0)(x), first(x))


def test_a_fit_that_is_exact_ends():
    x = _column(20)
    with pytest.raises(UsageError, match="y is 0 everywhere"):
        fit_multi_stage(x, 0 * x)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"y": torch.ones(4)}, r"must be floats \[samples, 1\]"),
        ({"y": torch.full((60, 1), math.nan)}, "must be finite"),
        ({"stages": 0}, "must be above 0, got 0"),
        ({"lr": 0.0}, "must be above 0"),
        ({"adam_steps": [1, 2], "stages": 3}, "one for each of 3 stages"),
        ({"lbfgs_steps": -1}, "steps must be 0 or more"),
        ({"width": 0, "adam_steps": 0}, "width and depth must be at least 1"),
        ({"x": torch.zeros(60, 1)}, "between two different values"),
    ],
)
def test_wrong_use_is_named(change, text):
    arguments = {"x": _column(), "y": _column().sin(), **change}
    with pytest.raises(UsageError, match=text):
        fit_multi_stage(arguments.pop("x"), arguments.pop("y"), **arguments)
