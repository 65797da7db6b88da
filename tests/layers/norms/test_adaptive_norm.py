"""Adaptive modulation, shared with a low-rank part, against plain loops and what it generalises."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from trimtab.errors import UsageError
from trimtab.layers import AdaptiveBlock, AdaptiveModulation, SharedModulation
from trimtab.testing import LayerTestCase


def _randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _scatter(module):
    """Give every parameter a value of its own: the method starts many at 0."""
    for parameter in module.parameters():
        parameter.data.normal_(0.0, 0.3)
    return module


class _TwoBlocks(nn.Module):
    """As a diffusion transformer: one shared modulation, one adjustment in each block; the first token conditions."""

    def __init__(self, kind):
        super().__init__()
        self.shared = None if kind == "full" else SharedModulation(4)
        self.blocks = nn.ModuleList(
            AdaptiveBlock(4, nn.Linear(4, 4), nn.Linear(4, 4), AdaptiveModulation(4, kind, rank=2)) for _ in range(2)
        )

    def forward(self, tokens):
        condition, x = tokens[:, 0], tokens[:, 1:]
        shared = None if self.shared is None else self.shared(condition)
        for block in self.blocks:
            x = block(x, condition, shared)
        return x


class TestSola(LayerTestCase):
    def layer(self):
        return _scatter(_TwoBlocks("sola"))

    def inputs(self, samples):
        return (_randn(samples, 4, 4),)


class TestFull(LayerTestCase):
    def layer(self):
        return _scatter(_TwoBlocks("full"))

    def inputs(self, samples):
        return (_randn(samples, 4, 4),)


def _silu(x):
    return x / (1 + np.exp(-x))


def test_equals_plain_loops():
    torch.manual_seed(0)
    shared = _scatter(SharedModulation(4)).double()
    layer = _scatter(AdaptiveModulation(4, rank=2, alpha=6.0)).double()
    condition = _randn(3, 4).double()
    found = layer(condition, shared(condition)).detach().numpy()
    w, b = (part.detach().numpy() for part in (shared.linear.weight, shared.linear.bias))
    down, up, table = (part.detach().numpy() for part in (layer.down.weight, layer.up.weight, layer.table))
    for sample in range(3):
        s = _silu(condition[sample].numpy())
        flat = w @ s + b + 6.0 / 2 * up @ (down @ s)
        for part in range(6):
            np.testing.assert_allclose(found[sample, part], flat[4 * part : 4 * part + 4] + table[part], rtol=1e-9)


@pytest.mark.parametrize("open_gates", [True, False])
def test_block_equals_plain_loops(open_gates):
    torch.manual_seed(0)
    block = _scatter(
        AdaptiveBlock(4, nn.Linear(4, 4), nn.Linear(4, 4), AdaptiveModulation(4, "full"), open_gates=open_gates)
    ).double()
    x, condition = _randn(2, 3, 4).double(), _randn(2, 4, seed=1).double()
    parts = block.modulation(condition).detach().numpy()
    found = block(x, condition).detach().numpy()

    def branch(row, norm, sublayer, shift, scale, gate):
        row = (row - row.mean()) / np.sqrt(row.var() + 1e-5)
        row = row * norm.weight.detach().numpy() + norm.bias.detach().numpy()
        row = (1 + scale) * row + shift
        y = sublayer.weight.detach().numpy() @ row + sublayer.bias.detach().numpy()
        return (1 - gate if open_gates else gate) * y

    for sample in range(2):
        for position in range(3):
            y = x[sample, position].numpy()
            y = y + branch(y, block.norm1, block.attention, *parts[sample, :3])
            y = y + branch(y, block.norm2, block.mlp, *parts[sample, 3:])
            np.testing.assert_allclose(found[sample, position], y, rtol=1e-9)


def test_sola_starts_as_single():
    """The same output, and the same gradient of all that the two share; the low-rank part is there to be learned."""
    torch.manual_seed(0)
    shared = _scatter(SharedModulation(4))
    single, sola = AdaptiveModulation(4, "single"), AdaptiveModulation(4, rank=2)
    table = torch.randn(6, 4)
    condition, weight = _randn(3, 4), _randn(3, 6, 4, seed=2)
    gradients = []
    for layer in (single, sola):
        layer.table.data.copy_(table)
        shared.zero_grad()
        output = layer(condition, shared(condition))
        (output * weight).sum().backward()
        gradients.append((output.detach(), shared.linear.weight.grad.clone(), layer.table.grad))
    for mine, its in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, its, rtol=0, atol=0)
    assert sola.up.weight.grad.any()
    assert not sola.down.weight.grad.any()


@pytest.mark.parametrize("kind", ["full", "single", "sola"])
def test_every_kind_starts_as_a_plain_pre_norm_block(kind):
    torch.manual_seed(0)
    x, condition = _randn(2, 3, 4), _randn(2, 4, seed=1)
    attention, mlp = nn.Linear(4, 4), nn.Linear(4, 4)
    shared = SharedModulation(4)(condition)
    norm = nn.LayerNorm(4)
    expected = x + attention(norm(x))
    expected = expected + mlp(norm(expected))
    modulation = AdaptiveModulation(4, kind, rank=1)
    torch.testing.assert_close(AdaptiveBlock(4, attention, mlp, modulation)(x, condition, shared), expected)
    closed = AdaptiveBlock(4, attention, mlp, modulation, open_gates=False)
    torch.testing.assert_close(closed(x, condition, shared), x)


def test_high_rank_reaches_any_full_modulation():
    """With 6 r = D, W + B A can be any matrix: set it to that of a full modulation by its factors."""
    torch.manual_seed(0)
    full, shared = _scatter(AdaptiveModulation(6, "full")), _scatter(SharedModulation(6))
    layer = AdaptiveModulation(6, rank=1)
    layer.down.weight.data.copy_(torch.eye(6))
    layer.up.weight.data.copy_(full.own.weight - shared.linear.weight)
    layer.table.data.copy_((full.own.bias - shared.linear.bias).view(6, 6))
    condition = _randn(5, 6)
    torch.testing.assert_close(layer(condition, shared(condition)), full(condition))


def test_parameters_saved_at_the_authors_size():
    """EzAudio-XL: 29 blocks of width 1152, rank 36: full modulations have 231 M parameters, these 59 M."""

    def count(*modules):
        return sum(p.numel() for module in modules for p in module.parameters())

    width, blocks = 1152, 29
    full = blocks * count(AdaptiveModulation(width, "full", device="meta"))
    sola = count(SharedModulation(width, device="meta")) + blocks * count(AdaptiveModulation(width, device="meta"))
    assert full == blocks * (6 * width**2 + 6 * width)
    assert sola == 6 * width**2 + 6 * width + blocks * (7 * 36 * 6 * width + 6 * width)
    assert (round(full / 1e6), round(sola / 1e6)) == (231, 59)


def test_options():
    assert AdaptiveModulation(4, bias=False).table is None
    assert AdaptiveModulation(4, rank=3).scaling == 1
    assert AdaptiveModulation(4, rank=4, alpha=2.0).scaling == 0.5
    block = AdaptiveBlock(4, nn.Identity(), nn.Identity(), AdaptiveModulation(4, "full"), norm=nn.RMSNorm)
    assert isinstance(block.norm1, nn.RMSNorm)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: AdaptiveModulation(4, "solo"), "unknown kind of modulation 'solo'. Did you mean 'sola'?"),
        (lambda: AdaptiveModulation(4, rank=0), "rank must be at least 1, got 0"),
        (lambda: AdaptiveModulation(4, alpha=math.inf), "alpha must be finite"),
        (lambda: SharedModulation(0), "width must be at least 1, got 0"),
        (lambda: AdaptiveModulation(4)(torch.zeros(1, 4)), "'sola' needs the output of SharedModulation"),
    ],
)
def test_wrong_arguments(call, text):
    with pytest.raises(UsageError, match=text):
        call()
