"""The scaled sigmoid against its definition, and put into models and taken out again."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from trimtab.errors import UsageError
from trimtab.layers import ScaledSigmoid
from trimtab.remedy import apply, remove
from trimtab.testing import LayerTestCase


def _model():
    return nn.Sequential(nn.Linear(4, 6), nn.Sigmoid(), nn.Linear(6, 3), nn.Sigmoid())


class TestScaledSigmoid(LayerTestCase):
    def layer(self):
        return nn.Sequential(nn.Linear(4, 3), ScaledSigmoid(0.3))

    def inputs(self, samples):
        return (torch.linspace(-3, 3, samples * 4).view(samples, 4),)


class TestChangedModel(LayerTestCase):
    def layer(self):
        model = _model()
        apply(model, "scaled-sigmoid")
        return model

    def inputs(self, samples):
        return (torch.linspace(-3, 3, samples * 4).view(samples, 4),)


@pytest.mark.parametrize("alpha", [0.05, 0.1, 0.5, 1.0])
def test_equals_the_definition(alpha):
    points = [-300.0, -7.0, -0.2, 0.0, 0.4, 30.0, 300.0]
    found = ScaledSigmoid(alpha)(torch.tensor(points, dtype=torch.float64))
    expected = [1 / (1 + math.exp(-alpha * x)) for x in points]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


def test_slope_far_from_zero():
    """dy/dx = alpha y (1 - y): at x = 20, of 2e-9 for the sigmoid, 0.01 with alpha = 0.1."""
    x = torch.tensor(20.0, dtype=torch.float64, requires_grad=True)
    slopes = [float(torch.autograd.grad(ScaledSigmoid(alpha)(x), x)[0]) for alpha in (1.0, 0.1)]
    y = 1 / (1 + math.exp(-2))
    assert slopes[1] == pytest.approx(0.1 * y * (1 - y), rel=1e-9)
    assert slopes[0] < 3e-9


def test_one_is_torchs_sigmoid():
    x = torch.linspace(-20, 20, 101)
    assert torch.equal(ScaledSigmoid(1.0)(x), nn.Sigmoid()(x))


def test_apply_and_remove():
    model, x = _model(), torch.linspace(-3, 3, 8).view(2, 4)
    calls = []
    model[1].register_forward_hook(lambda *_: calls.append(1))
    before, text = model(x), repr(model)
    changed = apply(model, "scaled-sigmoid", alpha=0.2)
    assert changed.changes == {"1": "sigmoid(0.2 x)", "3": "sigmoid(0.2 x)"}
    expected = torch.sigmoid(0.2 * model[2](torch.sigmoid(0.2 * model[0](x))))
    torch.testing.assert_close(model(x), expected)
    assert len(calls) == 2
    with pytest.raises(UsageError, match=r"no nn.Sigmoid in Sequential"):
        apply(model, "scaled-sigmoid")
    remove(model, "scaled-sigmoid")
    assert repr(model) == text
    assert torch.equal(model(x), before)
    with pytest.raises(UsageError, match="nothing to remove"):
        remove(model, "scaled-sigmoid")


def test_shared_and_root_modules():
    shared = nn.Sigmoid()
    model = nn.Sequential(shared, nn.Linear(2, 2), shared)
    assert list(apply(model, "scaled-sigmoid").changes) == ["0"]
    assert isinstance(model[2], ScaledSigmoid)
    root = nn.Sigmoid()
    assert list(apply(root, "scaled-sigmoid").changes) == [""]
    assert root(torch.tensor(10.0)) == pytest.approx(1 / (1 + math.exp(-1)))
    built = nn.Sequential(ScaledSigmoid())
    with pytest.raises(UsageError, match="nothing to remove"):
        remove(built, "scaled-sigmoid")


@pytest.mark.parametrize("alpha", [0.0, -1.0, 1.5, math.nan])
def test_alpha_is_checked(alpha):
    model = _model()
    with pytest.raises(UsageError, match="alpha must be above 0 and at most 1"):
        ScaledSigmoid(alpha)
    with pytest.raises(UsageError, match="alpha must be above 0 and at most 1"):
        apply(model, "scaled-sigmoid", alpha=alpha)
    assert isinstance(model[1], nn.Sigmoid)
