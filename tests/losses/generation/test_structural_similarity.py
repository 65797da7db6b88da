"""MS-SSIM against NumPy and SciPy in float64, against pytorch-msssim, and its gradients where it is delicate."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.signal import convolve2d

from trimtab.errors import UsageError
from trimtab.losses import ms_ssim, ms_ssim_loss

_TWO = (0.4, 0.6)


def _images(side=(24, 26), channels=2, dtype=torch.float64, noise=0.3):
    generator = torch.Generator().manual_seed(0)
    smooth = torch.rand(3, channels, 5, 5, generator=generator, dtype=torch.float64)
    x = torch.nn.functional.interpolate(smooth, side, mode="bilinear")
    y = (x + noise * torch.rand(x.shape, generator=generator, dtype=torch.float64) - noise / 2).clamp(0, 1)
    return x.to(dtype), y.to(dtype)


def _numpy(x, y, weights, window=11, sigma=1.5, data_range=1.0):
    """One channel, by a full two-dimensional window and unbiased of nothing: the formulas as printed."""
    place = np.arange(window) - window // 2
    kernel = np.exp(-(place[:, None] ** 2 + place[None, :] ** 2) / (2 * sigma**2))
    kernel /= kernel.sum()
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    result = 1.0
    for scale, weight in enumerate(weights):
        if scale:
            x, y = (np.pad(a, [(0, a.shape[0] % 2), (0, a.shape[1] % 2)], mode="edge") for a in (x, y))
            x, y = ((a[::2, ::2] + a[1::2, ::2] + a[::2, 1::2] + a[1::2, 1::2]) / 4 for a in (x, y))
        mean = [convolve2d(a, kernel, mode="valid") for a in (x, y)]
        second = [convolve2d(a, kernel, mode="valid") for a in (x * x, y * y, x * y)]
        cs = (2 * (second[2] - mean[0] * mean[1]) + c2) / (second[0] - mean[0] ** 2 + second[1] - mean[1] ** 2 + c2)
        if scale == len(weights) - 1:
            cs = cs * (2 * mean[0] * mean[1] + c1) / (mean[0] ** 2 + mean[1] ** 2 + c1)
        result *= cs.mean() ** weight
    return result


@pytest.mark.parametrize("side", [(24, 26), (23, 25)], ids=["even", "odd"])
@pytest.mark.parametrize("options", [{}, {"window": 7, "sigma": 1.0}, {"data_range": 2.0}], ids=str)
@pytest.mark.parametrize("weights", [(1.0,), _TWO], ids=str)
def test_equals_numpy(weights, options, side):
    x, y = _images(side)
    found = ms_ssim(x, y, weights=weights, **options)
    for image, (a, b) in zip(found.tolist(), zip(x.numpy(), y.numpy(), strict=True), strict=True):
        expected = np.mean([_numpy(a[c], b[c], weights, **options) for c in range(2)])
        assert image == pytest.approx(expected, rel=1e-9)
    loss = ms_ssim_loss(x, y, weights=weights, **options)
    assert float(loss) == pytest.approx(1 - float(found.mean()), rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_equals_pytorch_msssim(dtype):
    peer = pytest.importorskip("pytorch_msssim")
    x, y = _images((176, 192), 3, dtype)
    x.requires_grad_()
    expected = peer.ms_ssim(x, y, data_range=1.0, size_average=False)
    found = ms_ssim(x, y)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    (left,) = torch.autograd.grad(found.sum(), x)
    (right,) = torch.autograd.grad(expected.sum(), x)
    torch.testing.assert_close(left, right, rtol=1e-3, atol=1e-5 * float(right.abs().max()))
    single = peer.ssim(x, y, data_range=1.0, size_average=False)
    # Its window is rounded to float32.
    torch.testing.assert_close(ms_ssim(x, y, weights=(1.0,)), single, rtol=0, atol=1e-5)


def test_gradcheck():
    x, y = _images((10, 9), 1)
    x = x[:1].requires_grad_()
    assert torch.autograd.gradcheck(
        lambda image: ms_ssim_loss(image, y[:1], weights=_TWO, window=5, reduction="none"), (x,)
    )


@pytest.mark.parametrize("case", ["constant", "black", "negative", "equal", "extreme"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_gradient_is_finite(case, dtype):
    x, y = _images(dtype=dtype)
    x, y = {
        "constant": (torch.full_like(x, 0.4), torch.full_like(x, 0.7)),
        "black": (torch.zeros_like(x), y),
        "negative": (1 - y, y),
        "equal": (y.clone(), y),
        "extreme": (1e4 * x, y),
    }[case]
    x.requires_grad_()
    loss = ms_ssim_loss(x, y, weights=_TWO)
    loss.backward()
    assert loss.isfinite()
    assert x.grad.isfinite().all()
    if case == "equal":
        assert float(loss.detach()) == pytest.approx(0, abs=1e-5)
    if case == "constant":
        # Without structure, only the means at the last scale count.
        means = (2 * 0.4 * 0.7 + 1e-4) / (0.4**2 + 0.7**2 + 1e-4)
        assert float(loss.detach()) == pytest.approx(1 - means**0.6, rel=1e-3)
        assert x.grad.abs().sum() > 0


def test_a_scale_of_opposite_structure_leaves_the_others_their_gradient():
    """A chequered pattern of opposite sign: similarity is negative at the fine scale, and averaged away at the next."""
    _, low = _images(channels=1)
    low = 0.5 + 0.2 * (low - low.mean())
    rows, columns = torch.meshgrid(torch.arange(24), torch.arange(26), indexing="ij")
    pattern = 0.3 * ((rows + columns) % 2 * 2 - 1)
    x, y = (0.8 * low + 0.1 + pattern).requires_grad_(), low - pattern
    assert (ms_ssim(x, y, weights=(1.0,)) < 0).all()
    ms_ssim_loss(x, y, weights=_TWO).backward()
    assert x.grad.isfinite().all()
    assert x.grad.abs().max() > 1e-7


def test_properties():
    x, y = _images()
    torch.testing.assert_close(ms_ssim(x, y, weights=_TWO), ms_ssim(y, x, weights=_TWO))
    closer = ms_ssim(x, 0.5 * (x + y), weights=_TWO)
    assert (closer > ms_ssim(x, y, weights=_TWO)).all()
    assert (closer < 1).all()
    scaled = ms_ssim(255 * x, 255 * y, data_range=255, weights=_TWO)
    torch.testing.assert_close(scaled, ms_ssim(x, y, weights=_TWO))


def test_computed_in_float32_or_better():
    x, y = _images(dtype=torch.bfloat16)
    loss = ms_ssim_loss(x, y, weights=_TWO)
    assert loss.dtype == torch.float32
    exact = ms_ssim_loss(x.double(), y.double(), weights=_TWO)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-4, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        under = ms_ssim_loss(x.float(), y.float(), weights=_TWO)
    torch.testing.assert_close(under, loss)


def test_micro_batches_add_up():
    x, y = _images()
    x.requires_grad_()
    (whole,) = torch.autograd.grad(ms_ssim_loss(x, y, weights=_TWO), x)
    leaf = x.detach().clone().requires_grad_()
    for rows in (slice(0, 1), slice(1, 3)):
        ms_ssim_loss(leaf[rows], y[rows], weights=_TWO, denominator=3).backward()
    torch.testing.assert_close(leaf.grad, whole)
    empty = ms_ssim_loss(x[:0], y[:0], weights=_TWO)
    (gradient,) = torch.autograd.grad(empty, x)
    assert float(empty.detach()) == 0
    assert not gradient.any()


def test_arguments_are_checked():
    x, y = _images()
    with pytest.raises(UsageError, match="at least 161 pixels wide and high for 5 scales"):
        ms_ssim_loss(x, y)
    with pytest.raises(UsageError, match="window must be an odd"):
        ms_ssim(x, y, window=10)
    with pytest.raises(UsageError, match="of one shape"):
        ms_ssim(x, y[:1])
    with pytest.raises(UsageError, match="weights must be"):
        ms_ssim(x, y, weights=())
    with pytest.raises(UsageError, match="data_range must be above 0"):
        ms_ssim(x, y, weights=_TWO, data_range=0)
