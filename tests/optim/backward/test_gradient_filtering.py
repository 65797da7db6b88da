"""Gradient filtering against plain loops, exact gradients where its assumption holds, and its predicted savings."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from trimtab.errors import UsageError
from trimtab.optim.backward.gradient_filtering import (
    GradientFilteredConv2d,
    filtered_conv2d,
    gradient_filter,
    remove_gradient_filter,
)


def _rand(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def _loops(x, weight, gy, r, stride, groups, share):
    """Both gradients pixel by pixel: every output pixel takes its patch's mean, every input pixel its patch's sum."""
    x, weight, gy = x.numpy(), weight.numpy(), gy.numpy()
    B, C, H, W = x.shape
    height, width = gy.shape[-2:]
    P, Q = math.ceil(height / r), math.ceil(width / r)
    # Patches are laid centred over the output, and r * stride of them over the input.
    gy_top, gy_left = math.ceil((P * r - height) / 2), math.ceil((Q * r - width) / 2)
    x_top, x_left = (math.ceil((n * r * s - size) / 2) for n, s, size in zip((P, Q), stride, (H, W), strict=True))
    means, counts = np.zeros((B, len(weight), P, Q)), np.zeros((P, Q))
    for i in range(height):
        for j in range(width):
            p, q = (i + gy_top) // r, (j + gy_left) // r
            means[:, :, p, q] += gy[:, :, i, j]
            counts[p, q] += 1
    means /= counts
    gx, gw = np.zeros_like(x), np.zeros_like(weight)
    for i in range(H):
        for j in range(W):
            p, q = (i + x_top) // (r * stride[0]), (j + x_left) // (r * stride[1])
            for o in range(len(weight)):
                group = o // (len(weight) // groups)
                for c in range(C // groups):
                    channel = group * (C // groups) + c
                    for b in range(B):
                        gx[b, channel, i, j] += weight[o, c].sum() * means[b, o, p, q] * share
                        gw[o, c] += x[b, channel, i, j] * means[b, o, p, q] * share
    return gx, gw


@pytest.mark.parametrize("follow", ["paper", "code"])
@pytest.mark.parametrize(
    ("size", "kernel", "stride", "padding", "dilation", "groups", "r"),
    [
        ((8, 8), 3, (1, 1), (1, 1), 1, 1, 2),
        ((7, 9), 3, (1, 1), (1, 1), 1, 1, 4),
        ((9, 8), 3, (2, 2), (1, 1), 1, 1, 2),
        ((8, 10), 5, (2, 1), (2, 2), 1, 2, 3),
        ((6, 6), 1, (1, 1), (0, 0), 1, 4, 2),
        ((8, 8), 3, (1, 1), (2, 2), 2, 1, 3),
        ((7, 7), 2, (1, 1), (1, 1), 1, 1, 3),
    ],
)
def test_equals_plain_loops(size, kernel, stride, padding, dilation, groups, r, follow):
    x, weight, bias = _rand(2, 4, *size), _rand(4, 4 // groups, kernel, kernel, seed=1), _rand(4, seed=2)
    for tensor in (x, weight, bias):
        tensor.requires_grad_()
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    y = filtered_conv2d(x, weight, bias, patch_size=r, follow=follow, **options)
    torch.testing.assert_close(y, F.conv2d(x, weight, bias, **options), rtol=0, atol=0)
    gy = _rand(*y.shape, seed=3)
    y.backward(gy)
    share = 1.0 if follow == "code" else 1 / (stride[0] * stride[1])
    gx, gw = _loops(x.detach(), weight.detach(), gy, r, stride, groups, share)
    np.testing.assert_allclose(x.grad.numpy(), gx, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(weight.grad.numpy(), gw, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(bias.grad, gy.sum(dim=(0, 2, 3)))


@pytest.mark.parametrize("stride", [1, 2])
def test_is_exact_where_the_assumption_holds(stride):
    """On a constant gradient map and away from the border, summing the kernel loses nothing on average."""
    x = torch.ones(1, 3, 24, 24, dtype=torch.float64, requires_grad=True)
    weight, gy = _rand(5, 3, 3, 3).requires_grad_(), _rand(1, 5, 1, 1, seed=1).expand(1, 5, 24 // stride, 24 // stride)
    means = []
    for conv in (F.conv2d, filtered_conv2d):
        gx, gw = torch.autograd.grad(conv(x, weight, stride=stride, padding=1), (x, weight), gy)
        # Inner pixels, whole periods of the stride; and the kernel's centre, which never meets the padding.
        means.append((gx[..., 4:20, 4:20].mean(dim=(2, 3)), gw[:, :, 1, 1]))
    torch.testing.assert_close(means[0], means[1], rtol=1e-12, atol=1e-12)
    code = filtered_conv2d(x, weight, stride=stride, padding=1, follow="code")
    gx, _ = torch.autograd.grad(code, (x, weight), gy)
    torch.testing.assert_close(gx[..., 4:20, 4:20].mean(dim=(2, 3)), stride**2 * means[0][0], rtol=1e-12, atol=1e-12)


def test_patches_of_one_pixel_and_kernel_of_one_are_exact():
    x, weight = _rand(2, 3, 5, 5).requires_grad_(), _rand(4, 3, 1, 1, seed=1).requires_grad_()
    gy = _rand(2, 4, 5, 5, seed=2)
    exact = torch.autograd.grad(F.conv2d(x, weight), (x, weight), gy)
    torch.testing.assert_close(torch.autograd.grad(filtered_conv2d(x, weight, patch_size=1), (x, weight), gy), exact)


def test_saved_bytes_and_multiplications_fall_as_predicted():
    B, C, out, H, K, r = 2, 16, 24, 16, 3, 4
    x, weight = _rand(B, C, H, H, dtype=torch.float32).requires_grad_(), torch.ones(out, C, K, K, requires_grad=True)
    measured = {}
    for name, conv in (("exact", F.conv2d), ("filtered", lambda *a, **k: filtered_conv2d(*a, **k, patch_size=r))):
        saved = []
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t) or t, lambda t: t)
        with hooks:
            y = conv(x, weight, padding=1)
        flops = FlopCounterMode(display=False)
        with flops:
            y.sum().backward()
        kept = {t.data_ptr(): t.numel() * t.element_size() for t in saved if t.data_ptr() != weight.data_ptr()}
        measured[name] = (sum(kept.values()), flops.get_total_flops())
    assert measured["exact"] == (4 * B * C * H * H, 2 * 2 * B * C * out * K * K * H * H)
    patches = (H // r) ** 2
    # x~, r^2 times smaller than x, and the kernel summed over its positions.
    assert measured["filtered"] == (4 * (B * C * patches + out * C), 2 * 2 * B * C * out * patches)


def test_points_along_the_exact_gradient():
    """Smooth images under a smooth loss, as the paper's energy argument has it: most of the energy is low-frequency."""
    grid = torch.linspace(0, 3, 32)
    phases = _rand(8, 3, 1, 1, dtype=torch.float32)
    x = torch.sin(grid[:, None] + phases) * torch.cos(1.3 * grid[None] - phases)
    torch.manual_seed(0)
    model = nn.Sequential(*(m for c in (3, 8, 8) for m in (nn.Conv2d(c, 8, 3, padding=1), nn.Tanh())))
    filtered = copy.deepcopy(model)
    gradient_filter(filtered, patch_size=2)
    cosines = {}
    for net in (model, filtered):
        net(x).square().mean().backward()
    for (name, a), b in zip(model.named_parameters(), filtered.parameters(), strict=True):
        cosines[name] = F.cosine_similarity(a.grad.flatten(), b.grad.flatten(), dim=0).item()
    assert min(cosines.values()) > 0.8, cosines
    assert np.mean(list(cosines.values())) > 0.95, cosines


def test_apply_and_remove():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.Conv2d(4, 4, 3),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(4, 4, 3, padding=4, dilation=4),
        nn.Sequential(nn.Conv2d(4, 4, 3, padding="same", bias=False)),
    )
    before, parameters = copy.deepcopy(model), list(model.parameters())
    x = _rand(2, 3, 12, 12, dtype=torch.float32)
    changes = gradient_filter(model, patch_size=2)
    assert changes == {"0": "backward over 2 x 2 patches", "4.0": "backward over 2 x 2 patches"}
    assert torch.equal(model(x), before(x))
    assert torch.equal(copy.deepcopy(model)(x), before(x))
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    with pytest.raises(UsageError, match="no convolution to change"):
        gradient_filter(model)
    assert set(remove_gradient_filter(model)) == {"0", "4.0"}
    assert [type(m) for m in model.modules()] == [type(m) for m in before.modules()]
    assert vars(model[0]).keys() == vars(before[0]).keys()
    assert remove_gradient_filter(model) == {}
    assert gradient_filter(model, only="4.*", patch_size=2) == {"4.0": "backward over 2 x 2 patches"}
    model(x).sum().backward()
    before(x).sum().backward()
    assert not torch.equal(model[4][0].weight.grad, before[4][0].weight.grad)


def test_unbatched_frozen_and_autocast():
    x, weight = _rand(3, 8, 8, dtype=torch.float32), _rand(4, 3, 3, 3, seed=1, dtype=torch.float32)
    y = filtered_conv2d(x, weight, padding=1)
    assert y.shape == (4, 8, 8)
    assert not y.requires_grad
    weight.requires_grad_()
    (reference,) = torch.autograd.grad(filtered_conv2d(x, weight, padding=1).sum(), weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = filtered_conv2d(x, weight, padding=1)
    assert y.dtype == torch.bfloat16
    (gradient,) = torch.autograd.grad(y.float().sum(), weight)
    assert gradient.dtype == torch.float32
    torch.testing.assert_close(gradient, reference, rtol=1e-2, atol=1e-2)
    x.requires_grad_()
    frozen = filtered_conv2d(x, weight.detach(), padding=1)
    frozen.sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"patch_size": 0}, "patch_size must be a whole number from 1 on, got 0"),
        ({"patch_size": 2.0}, "patch_size must be a whole number"),
        ({"padding": 0}, r"padding of at least dilation \(K - 1\) / 2"),
        ({"padding": 4, "dilation": 4}, "dilation below patch_size 4"),
        ({"follow": "papre"}, "Did you mean 'paper'"),
    ],
)
def test_wrong_options(options, text):
    with pytest.raises(UsageError, match=text):
        filtered_conv2d(torch.ones(1, 1, 8, 8), torch.ones(1, 1, 3, 3), **{"padding": 1, **options})


def test_wrong_shape_and_nothing_to_change():
    with pytest.raises(UsageError, match="needs"):
        filtered_conv2d(torch.ones(8, 8), torch.ones(1, 1, 1, 1))
    with pytest.raises(UsageError, match="0: gradient filtering needs padding"):
        gradient_filter(nn.Sequential(nn.Conv2d(1, 1, 3)))
    with pytest.raises(UsageError, match=r"Looked for torch.nn.Conv2d"):
        gradient_filter(nn.Linear(2, 2))
    assert issubclass(GradientFilteredConv2d, nn.Conv2d)
