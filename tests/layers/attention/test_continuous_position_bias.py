"""The log-spaced continuous position bias against plain loops, over window sizes, and in models that are changed."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from trimtab.errors import UsageError
from trimtab.layers import CosineAttention, LogCPB
from trimtab.remedy import apply, remove
from trimtab.testing import LayerTestCase
from trimtab.workloads.digits import VisionTransformer
from trimtab.workloads.transformer import Block, CausalSelfAttention, SelfAttention


class TestApplied(LayerTestCase):
    def layer(self):
        block = Block(8, SelfAttention(8, 2, causal=False))
        apply(block, "log-cpb", window=(2, 2), hidden=6, prefix=1)
        return block

    def inputs(self, samples):
        return (torch.randn(samples, 5, 8, generator=torch.Generator().manual_seed(0)),)


def _loops(bias, window, trained, log_spaced):
    first, second = bias.network[0], bias.network[2]
    w1, b1, w2 = (part.detach().numpy() for part in (first.weight, first.bias, second.weight))
    height, width = window
    found = np.zeros((bias.heads, height * width, height * width))
    for i in range(height * width):
        for j in range(height * width):
            offsets = (i // width - j // width, i % width - j % width)
            x = []
            for offset, size in zip(offsets, trained, strict=True):
                value = 8 * offset / max(size - 1, 1)
                if log_spaced:
                    value = math.copysign(math.log2(1 + abs(value)), value)
                x.append(value / math.log2(8))
            hidden = np.maximum(w1 @ np.array(x) + b1, 0)
            found[:, i, j] = 16 / (1 + np.exp(-(w2 @ hidden)))
    return found


@pytest.mark.parametrize("log_spaced", [True, False])
@pytest.mark.parametrize(
    ("window", "trained"), [((3, 4), None), ((4, 3), (2, 2)), ((1, 3), None), ((2, 2), (1, 1)), ((1, 1), None)]
)
def test_equals_plain_loops(window, trained, log_spaced):
    bias = LogCPB(window, 3, hidden=7, trained_window=trained, log_spaced=log_spaced, dtype=torch.float64)
    expected = _loops(bias, window, trained or window, log_spaced)
    np.testing.assert_allclose(bias().detach(), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("log_spaced", [True, False])
def test_another_window_shares_the_offsets_it_knows(log_spaced):
    bias = LogCPB((2, 2), 2, hidden=5, log_spaced=log_spaced)
    small = bias().detach()
    bias.set_window((3, 5))
    large = bias().detach()
    known = [0, 1, 5, 6]  # the upper left corner, 2 x 2, of 3 x 5
    torch.testing.assert_close(large[:, known][:, :, known], small)
    assert (bias.window, bias.trained_window) == ((3, 5), (2, 2))
    assert set(bias.state_dict()) == {"network.0.weight", "network.0.bias", "network.2.weight"}


def test_log_spacing_extrapolates_less():
    """From 8 x 8 to 16 x 16 the coordinates grow by 1.29 in the logarithm, by 2.14 linearly (paper, section 3.4)."""
    reach = {}
    for log_spaced in (True, False):
        bias = LogCPB((8, 8), 1, hidden=1, log_spaced=log_spaced)
        before = bias.coordinates.max()
        bias.set_window((16, 16))
        reach[log_spaced] = (bias.coordinates.max() / before).item()
    assert reach[False] == pytest.approx(15 / 7)
    assert reach[True] == pytest.approx(math.log2(1 + 8 * 15 / 7) / math.log2(9))


def test_a_prefix_has_no_bias():
    torch.manual_seed(0)
    plain = LogCPB((2, 2), 2, hidden=5)
    prefixed = LogCPB((2, 2), 2, hidden=5, prefix=2)
    prefixed.load_state_dict(plain.state_dict())
    bias = prefixed().detach()
    torch.testing.assert_close(bias[:, 2:, 2:], plain().detach())
    assert not bias[:, :2].any()
    assert not bias[:, :, :2].any()


def test_apply_and_remove():
    torch.manual_seed(0)
    model = VisionTransformer().eval()
    images = torch.randn(2, 64)
    expected, text = model(images), repr(model)
    changes = apply(model, "log-cpb", window=(4, 4)).changes
    assert changes == dict.fromkeys(
        ["blocks.0.attention", "blocks.1.attention"], "position bias over a window of 4 x 4"
    )
    assert not torch.allclose(model(images), expected)
    for block in model.blocks:
        block.attention.position_bias.network[2].weight.data.zero_()  # the same bias of 8 everywhere: no bias
    torch.testing.assert_close(model(images), expected)
    remove(model, "log-cpb")
    assert repr(model) == text
    torch.testing.assert_close(model(images), expected)


def test_cosine_attention_keeps_its_core():
    layer = nn.Sequential(CosineAttention(8, 2))
    expected = layer(torch.ones(1, 4, 8))
    apply(layer, "log-cpb", window=(2, 2))
    assert type(layer[0]) is CosineAttention
    assert isinstance(layer[0].position_bias, LogCPB)
    with pytest.raises(UsageError, match="no attention without one"):
        apply(layer, "log-cpb", window=(2, 2))
    remove(layer, "log-cpb")
    torch.testing.assert_close(layer(torch.ones(1, 4, 8)), expected)


def _biased():
    block = Block(8, SelfAttention(8, 2, causal=False))
    apply(block, "log-cpb", window=(2, 2))
    return block


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: LogCPB((0, 2), 2), r"window must be a height and a width of at least 1, got \(0, 2\)"),
        (lambda: LogCPB((2, 2, 2), 2), "must be a height and a width"),
        (lambda: LogCPB(4, 2), "window must be a height and a width of at least 1, got 4"),
        (
            lambda: CosineAttention(8, 2, position_bias=LogCPB((2, 2), 2))(torch.ones(1, 5, 8)),
            r"a bias of \(4, 4\) does not fit 5 positions",
        ),
        (lambda: _biased()(torch.ones(1, 5, 8)), r"a bias of \(4, 4\) does not fit 5 positions"),
        (lambda: LogCPB((2, 2), 0), "heads and hidden must be at least 1"),
        (lambda: LogCPB((2, 2), 1, prefix=-1), "prefix at least 0"),
        (lambda: apply(Block(8, CausalSelfAttention(8, 2)), "log-cpb", window=(2, 2)), "'attention' is causal"),
        (
            lambda: apply(Block(8, SelfAttention(8, 2, causal=False)), "log-cpb"),
            "missing a required argument: 'window'",
        ),
        (lambda: apply(nn.Linear(2, 2), "log-cpb", window=(2, 2)), "no attention without one in Linear"),
    ],
)
def test_wrong_arguments(call, text):
    with pytest.raises(UsageError, match=text):
        call()
