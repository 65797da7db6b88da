"""The five placements of norms, in plain loops and as torch draws two of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from trimtab.errors import UsageError
from trimtab.layers import ResidualBlock, ResidualStack
from trimtab.testing import LayerTestCase

PLACEMENTS = ["pre", "post", "sandwich", "peri", "res-post"]


def _mlp(width=6):
    return nn.Sequential(nn.Linear(width, 8), nn.Tanh(), nn.Linear(8, width))


class _StackCase(LayerTestCase):
    def inputs(self, samples):
        return (torch.randn(samples, 3, 6, generator=torch.Generator().manual_seed(1)),)

    def layer(self):
        return ResidualStack(6, [_mlp() for _ in range(2)], self.placement, norm=self.norm)


class TestPre(_StackCase):
    placement, norm = "pre", nn.LayerNorm


class TestPost(_StackCase):
    placement, norm = "post", nn.LayerNorm


class TestSandwich(_StackCase):
    placement, norm = "sandwich", nn.LayerNorm


class TestPeri(_StackCase):
    placement, norm = "peri", nn.LayerNorm


class TestResPost(_StackCase):
    placement, norm = "res-post", nn.LayerNorm


class _WithWeights(nn.Linear):
    """As attention: a tuple, and an option."""

    def forward(self, x, *, scale=1.0):
        return scale * super().forward(x), None


def _normalize(row, gain, bias, eps=1e-5):
    mean = sum(row) / len(row)
    variance = sum((value - mean) ** 2 for value in row) / len(row)
    return [(v - mean) / (variance + eps) ** 0.5 * g + b for v, g, b in zip(row, gain, bias, strict=True)]


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_equals_plain_loops(placement):
    """Two blocks, each with its own gains, drawn at random so that no norm can be missed or swapped."""
    torch.manual_seed(0)
    stack = ResidualStack(6, [nn.Linear(6, 6) for _ in range(2)], placement).double()
    for parameter in stack.parameters():
        parameter.data.normal_()
    x = torch.randn(6, dtype=torch.float64)

    def norm(module, row):
        return _normalize(row, module.weight.tolist(), module.bias.tolist())

    def f(module, row):
        return (module.weight.detach().numpy() @ np.array(row) + module.bias.detach().numpy()).tolist()

    y = x.tolist()
    if placement == "peri":
        y = norm(stack.embedding_norm, y)
    for block in stack.blocks:
        if placement == "pre":
            branch = f(block.sublayer, norm(block.input_norm, y))
        elif placement in ("sandwich", "peri"):
            branch = norm(block.output_norm, f(block.sublayer, norm(block.input_norm, y)))
        elif placement == "res-post":
            branch = norm(block.output_norm, f(block.sublayer, y))
        else:
            branch = f(block.sublayer, y)
        y = [a + b for a, b in zip(y, branch, strict=True)]
        if placement == "post":
            y = norm(block.stream_norm, y)
    if placement != "post":
        y = norm(stack.final_norm, y)
    np.testing.assert_allclose(stack(x).tolist(), y, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("placement", ["pre", "post"])
def test_pre_and_post_equal_torch(placement):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(
        8, 2, 16, dropout=0.0, batch_first=True, norm_first=placement == "pre", activation="gelu"
    )

    class _Attention(nn.Module):
        def forward(self, x):
            return layer.self_attn(x, x, x)

    mlp = nn.Sequential(layer.linear1, nn.GELU(), layer.linear2)
    attention, feed_forward = ResidualBlock(8, _Attention(), placement), ResidualBlock(8, mlp, placement)
    slot = "input_norm" if placement == "pre" else "stream_norm"
    getattr(attention, slot).load_state_dict(layer.norm1.state_dict())
    getattr(feed_forward, slot).load_state_dict(layer.norm2.state_dict())
    x = torch.randn(2, 5, 8)
    torch.testing.assert_close(feed_forward(attention(x)), layer(x))


@pytest.mark.parametrize(
    ("placement", "count"), [("pre", 3), ("post", 2), ("sandwich", 5), ("peri", 6), ("res-post", 3)]
)
def test_number_of_norms(placement, count):
    stack = ResidualStack(6, [_mlp(), _mlp()], placement, norm=nn.RMSNorm)
    assert sum(isinstance(part, nn.RMSNorm) for part in stack.modules()) == count


def test_embedding_norm_is_an_option_of_every_placement():
    assert isinstance(ResidualStack(6, [_mlp()], "pre", embedding_norm=True).embedding_norm, nn.LayerNorm)
    assert isinstance(ResidualStack(6, [_mlp()], "peri", embedding_norm=False).embedding_norm, nn.Identity)


def test_sublayers_may_return_tuples_and_take_options():
    block = ResidualBlock(4, _WithWeights(4, 4), "pre")
    x = torch.randn(2, 4)
    torch.testing.assert_close(block(x, scale=0.0), x)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: ResidualBlock(4, nn.Identity(), "perry"), "unknown norm placement 'perry'. Did you mean 'peri'?"),
        (lambda: ResidualBlock(0, nn.Identity()), "width must be at least 1, got 0"),
        (lambda: ResidualStack(4, []), "at least one sublayer"),
    ],
)
def test_wrong_arguments(call, text):
    with pytest.raises(UsageError, match=text):
        call()
