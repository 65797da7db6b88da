"""Pixel-wise gradient clipping against plain loops, and an image optimised through a frozen encoder with spikes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from trimtab.errors import UsageError
from trimtab.optim.backward.pixel_clipping import PixelGradientClip, clip_pixel_gradients


def _rand(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def _clip(g, max_norm, **options):
    x = torch.zeros_like(g, requires_grad=True)
    clip_pixel_gradients(x, max_norm, **options).backward(g)
    return x.grad


@given(seed=st.integers(0, 99), bound=st.floats(0.01, 10), channels=st.integers(1, 5))
@pytest.mark.parametrize("follow", ["paper", "code"])
def test_equals_plain_loops(follow, seed, bound, channels):
    g = _rand(2, channels, 3, 4, seed=seed)
    result = _clip(g, bound, follow=follow)
    for b in range(2):
        for i in range(3):
            for j in range(4):
                v = g[b, :, i, j].tolist()
                norm = math.sqrt(sum(e * e for e in v)) if follow == "paper" else max(abs(e) for e in v)
                expected = [e * min(1.0, bound / norm) for e in v]
                np.testing.assert_allclose(result[b, :, i, j].numpy(), expected, rtol=1e-12)


def test_bit_equal_below_the_bound():
    g = _rand(2, 3, 8, 8, dtype=torch.float32)
    norms = g.norm(dim=1, keepdim=True)
    result = _clip(g, 1.5)
    small = (norms < 1.499).expand_as(g)
    assert 0.2 < small.float().mean() < 0.8
    assert torch.equal(result[small], g[small])
    assert result.norm(dim=1).max() <= 1.5 * (1 + 1e-6)
    cosine = nn.functional.cosine_similarity(result.double(), g.double(), dim=1)
    torch.testing.assert_close(cosine, torch.ones_like(cosine), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_extremes_stay_finite_and_keep_their_direction(dtype):
    big = torch.finfo(dtype).max
    g = torch.tensor([[[big, 0.0, torch.finfo(dtype).tiny], [-big, 0.0, 0.0]]], dtype=dtype)
    result = _clip(g, 1.0)
    assert result.dtype == dtype
    torch.testing.assert_close(result[0, :, 0].float(), torch.tensor([1.0, -1.0]) / math.sqrt(2), rtol=1e-2, atol=0)
    assert torch.equal(result[0, :, 1:], g[0, :, 1:])


def test_spikes_that_are_not_finite_stay_visible():
    g = torch.tensor([[[float("inf"), 1.0], [1.0, 1.0]]])
    result = _clip(g, 5.0)
    assert not result[0, :, 0].isfinite().all()
    assert torch.equal(result[0, :, 1], g[0, :, 1])


def test_forward_is_the_identity_and_channels_may_stand_anywhere():
    x = _rand(2, 3, 4)
    assert torch.equal(clip_pixel_gradients(x, 1.0), x)
    g = _rand(2, 4, 4, 3, seed=1)
    torch.testing.assert_close(_clip(g, 0.5, dim=-1), _clip(g.movedim(-1, 1), 0.5).movedim(1, -1))
    # Under a loss scaler: scale times the bound on scale times the gradient is scale times the clipped gradient.
    torch.testing.assert_close(_clip(1024 * g, torch.tensor(512.0)), 1024 * _clip(g, 0.5))


@pytest.mark.parametrize("dim", [1, -1, 2])
def test_module(dim):
    module = PixelGradientClip(0.5, dim=dim)
    assert "max_norm=0.5" in repr(module)
    x = torch.zeros(2, 3, 4, requires_grad=True)
    module(x).backward(torch.full_like(x, 9.0))
    assert x.grad.norm(dim=dim).max() <= 0.5 * (1 + 1e-6)


def optimise(clip, lr, seed, steps=100):
    """Mean squared error of an image found by SGD through a frozen encoder whose gradient has spikes."""
    torch.manual_seed(seed)
    encoder = nn.Sequential(nn.Conv2d(3, 24, 3, padding=1), nn.LeakyReLU(0.5), nn.Conv2d(24, 24, 3, padding=1))
    encoder.requires_grad_(False)
    image = torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        latent = encoder(image)
    x = torch.full_like(image, 0.5, requires_grad=True)
    noise = torch.Generator().manual_seed(seed)

    def spikes(g):
        hit = torch.rand(1, 1, 16, 16, generator=noise) < 0.01
        return g + hit * 100 * torch.randn(g.shape, generator=noise)

    for _ in range(steps):
        z = clip_pixel_gradients(x, clip[1]) if clip[0] == "pixel" else x.view_as(x)
        z.register_hook(spikes)
        (0.5 * (encoder(z) - latent).square().sum()).backward()
        if clip[0] == "global":
            nn.utils.clip_grad_norm_([x], clip[1])
        with torch.no_grad():
            x -= lr * x.grad
        x.grad = None
    return (x.detach() - image).square().mean().item()


def test_spikes_do_not_spoil_an_optimised_image():
    """Each arm at the best of its own grid of rates and bounds, on three seeds."""
    rates = (0.003, 0.03, 0.1, 0.3)
    grids = {
        "none": [(("none", 0.0), lr) for lr in rates],
        "global": [(("global", c), lr) for c in (0.3, 1.0, 3.0) for lr in rates],
        "pixel": [(("pixel", c), lr) for c in (0.1, 0.3) for lr in rates],
    }
    best = {
        arm: min(np.mean([optimise(clip, lr, seed) for seed in range(3)]) for clip, lr in grid)
        for arm, grid in grids.items()
    }
    assert best["pixel"] < 0.5 * min(best["none"], best["global"]), best


@pytest.mark.parametrize("wrong", [0, -1.0, float("nan")])
def test_wrong_bound(wrong):
    with pytest.raises(UsageError, match="max_norm must be above 0"):
        PixelGradientClip(wrong)


def test_wrong_dimension_and_norm():
    with pytest.raises(UsageError, match="one of the 1 dimensions"):
        clip_pixel_gradients(torch.zeros(3), 1.0)
    with pytest.raises(UsageError, match="unknown follow 'l2'"):
        clip_pixel_gradients(torch.zeros(1, 3), 1.0, follow="l2")
