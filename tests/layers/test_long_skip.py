"""ScaleLong's coefficients against the authors' loop and NumPy, and the layer contract in a small UNet."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from trimtab.errors import UsageError
from trimtab.layers import LongSkipScale
from trimtab.testing import LayerTestCase


class UNet(nn.Module):
    """Three encoder blocks of widths 2, 4 and 4, and a decoder that adds their outputs back in."""

    def __init__(self, **options):
        super().__init__()
        self.down = nn.ModuleList([nn.Conv2d(1, 2, 3, padding=1), nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 1)])
        self.up = nn.ModuleList([nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1), nn.Conv2d(2, 1, 1)])
        self.scale = LongSkipScale(3, **options)

    def forward(self, x):
        skips = []
        for block in self.down:
            x = torch.tanh(block(x))
            skips.append(x)
        for block, skip in zip(self.up, reversed(self.scale(skips)), strict=True):
            x = block(x + skip)
        return x


class TestConstant(LayerTestCase):
    def layer(self):
        return UNet()

    def inputs(self, samples):
        return (torch.randn(samples, 1, 4, 4, generator=torch.Generator().manual_seed(0)),)


class TestLearnable(LayerTestCase):
    def layer(self):
        return UNet(kind="learnable", channels=(2, 4, 4), reduction=1)

    def inputs(self, samples):
        return (torch.randn(samples, 1, 4, 4, generator=torch.Generator().manual_seed(0)),)


@given(num_skips=st.integers(1, 9), kappa=st.sampled_from([0.3, 0.5, 0.7, 0.95, 1.0]))
def test_constant_coefficients_are_the_authors(num_skips, kappa):
    """Their decoder pops the skips, the deepest first, and multiplies number j by kappa^(n - 1 - j)."""
    skips = [torch.full((1, 1), float(i + 1), dtype=torch.float64) for i in range(num_skips)]
    scaled = LongSkipScale(num_skips, kappa=kappa)(skips)
    stack, count = list(skips), 0
    expected = []
    while stack:
        expected.append(stack.pop() * kappa ** (num_skips - 1 - count))
        count += 1
    torch.testing.assert_close(torch.cat(scaled[::-1]), torch.cat(expected))


def test_sqrt2_is_the_same_for_all():
    scaled = LongSkipScale(3, kind="sqrt2")([torch.ones(1, 2, dtype=torch.float64)] * 3)
    torch.testing.assert_close(torch.stack(scaled), torch.full((3, 1, 2), 0.5**0.5, dtype=torch.float64))


@pytest.mark.parametrize("shape", [(5, 8), (5, 8, 3), (5, 8, 2, 3)], ids=str)
def test_learnable_equals_numpy(shape):
    scale = LongSkipScale(2, kind="learnable", channels=8, reduction=4, dtype=torch.float64)
    skips = [torch.randn(shape, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i in range(2)]
    first, _, second, _ = scale.calibrations[0]
    w1, b1, w2, b2 = (p.detach().numpy() for p in (first.weight, first.bias, second.weight, second.bias))
    for scaled, skip in zip(scale(skips), skips, strict=True):
        values = skip.numpy()
        for sample, result in zip(values, scaled.detach().numpy(), strict=True):
            pooled = sample.reshape(8, -1).mean(axis=1)
            kappa = 1 / (1 + np.exp(-(w2 @ np.maximum(w1 @ pooled + b1, 0) + b2)))
            expected = np.stack([k * channel for k, channel in zip(kappa, sample, strict=True)])
            np.testing.assert_allclose(result, expected, rtol=1e-12)


def test_equal_widths_share_one_network():
    def count(**options):
        return len(LongSkipScale(4, kind="learnable", **options).calibrations)

    assert count(channels=8) == 1
    assert count(channels=(8, 8, 16, 16)) == 2
    assert count(channels=8, shared=False) == 4


def test_hidden_width_is_that_of_the_authors():
    scale = LongSkipScale(1, kind="learnable", channels=64)
    assert scale.calibrations[0][0].out_features == 4
    assert LongSkipScale(1, kind="learnable", channels=3).calibrations[0][0].out_features == 1


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"kind": "constnat"}, "Did you mean 'constant'"),
        ({"kappa": 0.0}, "kappa must be above 0"),
        ({"kappa": 1.1}, "at most 1"),
        ({"kind": "learnable"}, "takes the channels"),
        ({"channels": 8}, "takes no channels"),
        ({"kind": "learnable", "channels": (8, 8)}, "one for each skip"),
        ({"reduction": 0}, "reduction must be at least 1"),
    ],
)
def test_wrong_arguments(options, text):
    with pytest.raises(UsageError, match=text):
        LongSkipScale(3, **options)


def test_wrong_number_of_skips():
    with pytest.raises(UsageError, match="of 3 skips was given 2"):
        LongSkipScale(3)([torch.ones(1, 1)] * 2)
    with pytest.raises(UsageError, match="num_skips"):
        LongSkipScale(0)
