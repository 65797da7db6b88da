"""EfficientTrain: the crop against a Fourier transform by hand, numpy and scipy; the paper's schedule and its cost."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.signal
import torch
from hypothesis import given
from hypothesis import strategies as st

from trimtab.catalogue import method
from trimtab.errors import UsageError
from trimtab.schedule import efficient_train, low_frequency
from trimtab.workloads import train, workload


def _images(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


@given(side=st.integers(4, 12), half=st.integers(1, 6))
def test_crop_equals_a_discrete_fourier_transform_by_hand(side, half):
    """y_mn = sum over frequencies in [-B/2, B/2) of X_uv e^(2 pi i (u m + v n) / B) / H^2: X sampled more coarsely."""
    band = min(2 * half, side - side % 2)
    x = _images(side, side)
    grid = np.arange(side)
    expected = np.zeros((band, band), dtype=complex)
    for u in range(-band // 2, band // 2):
        for v in range(-band // 2, band // 2):
            wave = np.exp(-2j * np.pi * (u * grid[:, None] + v * grid) / side)
            here = np.arange(band)
            expected += (x * wave).sum() / side**2 * np.exp(2j * np.pi * (u * here[:, None] + v * here) / band)
    result = low_frequency(torch.from_numpy(x)[None, None], band)[0, 0].numpy()
    if band == side:
        expected = x
    np.testing.assert_allclose(result, expected.real, atol=1e-12)


def test_crop_equals_numpy_and_scipy():
    x = _images(3, 2, 16, 16)
    spectrum = np.fft.fftshift(np.fft.fft2(x), axes=(-2, -1))
    central = np.fft.ifftshift(spectrum[..., 3:13, 3:13], axes=(-2, -1)) * (10 / 16) ** 2
    result = low_frequency(torch.from_numpy(x), 10)
    np.testing.assert_allclose(result.numpy(), np.fft.ifft2(central).real, atol=1e-12)
    # Below the band's edge it is resampling by Fourier's method.
    smooth = np.fft.ifft2(np.fft.fft2(x) * (np.abs(np.fft.fftfreq(16, 1 / 16)) < 5)[:, None]).real
    smooth = np.fft.ifft2(np.fft.fft2(smooth) * (np.abs(np.fft.fftfreq(16, 1 / 16)) < 5)).real
    resampled = scipy.signal.resample(scipy.signal.resample(smooth, 10, axis=-1), 10, axis=-2)
    np.testing.assert_allclose(low_frequency(torch.from_numpy(smooth), 10).numpy(), resampled, atol=1e-12)


def test_low_pass_at_full_size_samples_the_same_function():
    x = torch.from_numpy(_images(1, 1, 12, 12))
    low, kept = low_frequency(x, 6), low_frequency(x, 6, keep_size=True)
    assert kept.shape == x.shape
    # Every other pixel of the full-size picture is the small one, but for the frequency at the band's edge.
    edge = torch.fft.fft2(x)
    edge[..., 3, :] = edge[..., -3, :] = edge[..., :, 3] = edge[..., :, -3] = 0
    smooth = torch.fft.ifft2(edge).real
    torch.testing.assert_close(
        low_frequency(smooth, 6, keep_size=True)[..., ::2, ::2], low_frequency(smooth, 6), rtol=0, atol=1e-12
    )
    torch.testing.assert_close(kept.mean(), low.mean())
    assert kept.var() < x.var()


def test_schedule_is_the_papers():
    paper, code = efficient_train(224, 300), efficient_train(224, 300, follow="code")
    assert [paper.band(epoch) for epoch in range(300)] == [160] * 180 + [192] * 60 + [224] * 60
    assert [paper.magnitude(epoch) for epoch in range(301)] == pytest.approx(np.linspace(0, 9, 301))
    assert [code.magnitude(epoch) for epoch in (0, 59, 60, 120, 180, 240, 299, 300)] == [1, 1, 3, 5, 7, 9, 9, 9]
    assert paper.band.ramp == 240
    assert [efficient_train(8, 5).band(step) for step in range(6)] == [6, 6, 6, 6, 8, 8]
    assert efficient_train(27, 5).band(9) == 27


def test_costs_what_the_paper_says():
    """A convolution's cost goes with the pixels: 1.5 times less, the paper's claim."""
    band = efficient_train(224, 300).band
    cost = sum(band(epoch) ** 2 for epoch in range(300)) / (300 * 224**2)
    assert 1 / cost == pytest.approx(1.53, abs=0.01)


def test_a_run_sees_low_frequencies_first():
    x = torch.from_numpy(_images(2, 1, 28, 28)).float()
    apply = method("efficient-train").apply
    batches = apply(lambda _: (x, torch.zeros(2)), model=None, steps=100)
    assert [batches(step)[0].shape[-1] for step in (0, 59, 60, 80)] == [20, 20, 24, 28]
    assert torch.equal(batches(80)[0], x)
    flat = apply(lambda _: (x.flatten(1), torch.zeros(2)), model=None, steps=100)
    torch.testing.assert_close(flat(0)[0].view(2, 1, 28, 28), low_frequency(x, 20, keep_size=True))


def test_a_workload_trains():
    digits = workload("digits-cnn")
    assert not train(digits, digits.defaults.replace(steps=6, remedies=("efficient-train",))).diverged


def test_half_precision_comes_back_as_it_was():
    x = torch.from_numpy(_images(1, 1, 8, 8))
    half = low_frequency(x.bfloat16(), 4)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.double(), low_frequency(x, 4), atol=0.02, rtol=0.02)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: low_frequency(torch.ones(1, 1, 8, 8), 9), r"band must be in \[2, 8\], the images' side, got 9"),
        (lambda: low_frequency(torch.ones(1, 1, 8, 8), 1), r"band must be in \[2, 8\]"),
        (lambda: low_frequency(torch.ones(2, 64), 4), "images must be"),
        (lambda: efficient_train(1, 10), "full must be a whole number, at least 2, got 1"),
        (lambda: efficient_train(8, 0), "total must be a whole number of steps, at least 1"),
        (lambda: efficient_train(8, 10).magnitude(-1), "step must be a whole number"),
    ],
)
def test_wrong_use_is_one_line(call, text):
    with pytest.raises(UsageError, match=text):
        call()
