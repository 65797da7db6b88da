"""The layer contract holds for torch's layers, and catches layers that break it, one fault at a time."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.autograd.gradcheck import GradcheckError

from trimtab.testing import LayerTestCase


class TestLayerNormAndLinear(LayerTestCase):
    def layer(self):
        return nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 3))

    def inputs(self, samples):
        return (torch.randn(samples, 4, generator=torch.Generator().manual_seed(0)),)


class TestEmbedding(LayerTestCase):
    """Integer inputs, and a parameter without a gradient."""

    unused = ("1.weight",)

    def layer(self):
        class Model(nn.Sequential):
            def forward(self, tokens):
                return self[0](tokens).sum(dim=1)

        return Model(nn.Embedding(7, 4), nn.Linear(2, 2, bias=False))

    def inputs(self, samples):
        return (torch.arange(3 * samples).view(samples, 3) % 7,)


class _Faulty(nn.Module):
    def __init__(self, fault):
        super().__init__()
        self.fault = fault
        self.linear = nn.Linear(4, 3)
        self.extra = nn.Parameter(torch.ones(3))
        self.register_buffer("count", torch.zeros(()))
        self.outside = 0.0

    def forward(self, x):
        y = self.linear(x) * (1.0 if self.fault == "unused parameter" else self.extra)
        if self.fault == "counts in evaluation":
            self.count += 1
        if self.fault == "state outside":
            self.outside += 1.0
            y = y * (1 + self.outside)
        if self.fault == "batch statistics":
            y = y - y.mean(dim=0)
        if self.fault == "random":
            y = y + torch.rand(())
        if self.fault == "upcasts":
            y = y.float()
        if self.fault == "not finite when empty" and not len(x):
            y = y.sum(dim=0, keepdim=True)
        if self.fault == "detached":
            y = y.detach() + 0 * y
        return y


@pytest.mark.parametrize(
    ("fault", "test", "arguments"),
    [
        ("counts in evaluation", "test_evaluation_changes_nothing", ()),
        ("state outside", "test_state_dict_round_trip", ()),
        ("batch statistics", "test_samples_do_not_mix", ()),
        ("batch statistics", "test_data_parallel", ()),
        ("random", "test_deterministic", ()),
        ("upcasts", "test_dtypes", (torch.bfloat16,)),
        ("unused parameter", "test_every_parameter_gets_a_gradient", ()),
        ("not finite when empty", "test_edge_shapes", (0,)),
        ("detached", "test_every_parameter_gets_a_gradient", ()),
    ],
)
def test_catches(fault, test, arguments):
    class Case(LayerTestCase):
        def layer(self):
            return _Faulty(fault)

        def inputs(self, samples):
            return (torch.randn(samples, 4, generator=torch.Generator().manual_seed(0)),)

    with pytest.raises(AssertionError):
        getattr(Case(), test)(*arguments)


def test_catches_a_wrong_gradient():
    class Case(LayerTestCase):
        def layer(self):
            return _Faulty("detached")

        def inputs(self, samples):
            return (torch.ones(samples, 4),)

    with pytest.raises(GradcheckError):
        Case().test_gradcheck()
