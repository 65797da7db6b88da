"""GIN-attention against a loop over heads and nodes, its special cases, and the swap into models."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from trimtab.errors import UsageError
from trimtab.layers import GINAttention, GINCore
from trimtab.layers._self_attention import SelfAttention
from trimtab.remedy import apply, remove
from trimtab.testing import LayerTestCase


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


class TestGINAttention(LayerTestCase):
    def layer(self):
        return GINAttention(8, 2, causal=True, dropout=0.0)

    def inputs(self, samples):
        return (torch.randn(samples, 5, 8, generator=_generator()),)


class TestAppliedGINAttention(LayerTestCase):
    def layer(self):
        model = nn.Sequential(nn.Linear(8, 8), SelfAttention(8, 2, causal=False))
        apply(model, "gin-attention", dropout=0.0, multiplier=1.0)
        return model

    def inputs(self, samples):
        return (torch.randn(samples, 5, 8, generator=_generator()),)


@pytest.mark.parametrize("causal", [False, True])
def test_equals_the_loop(causal):
    layer = GINAttention(6, 2, causal=causal, multiplier=1.5, sharpness=2.0).double().eval()
    with torch.no_grad():
        layer.gin.gain.uniform_(0.5, 2)
        layer.gin.eps.uniform_(-1, 1)
    x = torch.randn(1, 5, 6, generator=_generator(), dtype=torch.float64)
    p = {name: value.detach().numpy() for name, value in layer.named_parameters()}
    q, k, nodes = x[0].numpy() @ p["q_proj.weight"].T, x[0].numpy() @ p["k_proj.weight"].T, x[0].numpy()
    expected = np.zeros((5, 6))
    for head in range(2):
        part = slice(3 * head, 3 * head + 3)
        for i in range(5):
            seen = range(i + 1) if causal else range(5)
            weights = np.array([math.exp(2.0 * (q[i, part] @ k[j, part]) / math.sqrt(3)) for j in seen])
            weights = weights / weights.sum()
            z = (1 + p["gin.eps"][head, 0, 0]) * nodes[i, part]
            z = z + sum(weight * nodes[j, part] for weight, j in zip(weights, seen, strict=True))
            z = z @ p["gin.weight1"][head] + p["gin.bias1"][head, 0]
            z = z / np.sqrt((z**2).mean() + 1e-5) * p["gin.gain"][head, 0]
            z = z / (1 + np.exp(-z))
            expected[i, part] = z @ p["gin.weight2"][head] + p["gin.bias2"][head, 0]
    torch.testing.assert_close(layer(x)[0], torch.from_numpy(expected), rtol=1e-10, atol=1e-12)


def test_identity_mlp_is_attention_over_nodes():
    """With eps = -1 and an MLP that passes its input on, a head is softmax attention whose values are the nodes."""
    core = GINCore(2, 4, multiplier=1.0).double().eval()
    q, k, h = (torch.randn(1, 2, 6, 4, generator=_generator(i), dtype=torch.float64) for i in range(3))
    with torch.no_grad():
        core.eps.fill_(-1.0)
        for head in range(2):
            core.weight1[head].copy_(torch.eye(4))
            core.weight2[head].copy_(torch.eye(4))
        core.bias1.zero_()
        core.bias2.zero_()
        attention = F.scaled_dot_product_attention(q, k, h, is_causal=True)
        expected = F.silu(F.rms_norm(attention, (4,), eps=1e-5))
        torch.testing.assert_close(core(q, k, h, causal=True), expected)


def test_it_is_causal():
    layer, x = GINAttention(8, 2, causal=True).eval(), torch.randn(1, 9, 8, generator=_generator())
    other = x.clone()
    other[:, 5:] += 1
    torch.testing.assert_close(layer(x)[:, :5], layer(other)[:, :5], rtol=1e-5, atol=1e-6)


def test_apply_and_remove():
    model = nn.Sequential(SelfAttention(8, 2, causal=True), nn.Linear(8, 8)).eval()
    x = torch.randn(2, 5, 8, generator=_generator())
    plain, names = model(x), set(model.state_dict())
    assert list(apply(model, "gin-attention").changes) == ["0"]
    assert torch.equal(model(x), model(x))  # no dropout: it evaluates still
    assert not torch.allclose(model(x), plain)
    with pytest.raises(UsageError, match="'0' is a _ConvertedGIN already: remove that first"):
        apply(model, "gin-attention")
    assert list(remove(model, "gin-attention").changes) == ["0"]
    assert torch.equal(model(x), plain)
    assert set(model.state_dict()) == names


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"heads": 3}, "width must be a multiple of heads, got 8 and 3"),
        ({"multiplier": 0.1}, "multiplier must give an MLP of width 1 or more"),
        ({"dropout": -0.1}, "dropout must be at least 0"),
        ({"norm_eps": 0.0}, "norm_eps must be above 0"),
    ],
)
def test_wrong_options(options, text):
    with pytest.raises(UsageError, match=text):
        GINAttention(8, **{"heads": 2, "causal": True, **options})
