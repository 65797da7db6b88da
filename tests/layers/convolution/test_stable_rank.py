"""Stable rank normalisation of convolutions against the explicit matrix of their operators."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from trimtab.errors import UsageError
from trimtab.layers.convolution.stable_rank import StableRankNorm
from trimtab.remedy import apply, remove
from trimtab.testing import LayerTestCase


def operator(conv, size):
    """Return the matrix of a circular convolution with `size` outputs a side, entry by entry."""
    kernel = conv.weight.detach().double().numpy()
    filters, width, *taps = kernel.shape
    sides = [size * s for s in conv.stride]
    matrix = np.zeros((filters, *[size] * len(taps), conv.in_channels, *sides))
    for position in itertools.product(range(size), repeat=len(taps)):
        for tap in itertools.product(*map(range, taps)):
            rule = zip(position, tap, sides, conv.stride, conv.dilation, strict=True)
            source = tuple((s * p + d * a) % side for p, a, side, s, d in rule)
            for i in range(filters):
                channels = i // (filters // conv.groups) * width + np.arange(width)
                matrix[(i, *position, channels, *source)] += kernel[(i, slice(None), *tap)]
    return matrix.reshape(filters * size ** len(taps), -1)


def singular_values(conv, size):
    return np.linalg.svd(operator(conv, size), compute_uv=False)


CASES = [
    nn.Conv1d(2, 3, 5),
    nn.Conv1d(3, 2, 3, stride=2, dilation=2),
    nn.Conv2d(2, 3, 3),
    nn.Conv2d(3, 2, 3, stride=2),
    nn.Conv2d(4, 4, 3, groups=2),
    nn.Conv2d(2, 2, (3, 1), stride=(1, 2)),
    nn.Conv3d(1, 2, 2),
]


def _conv(index):
    conv = CASES[index]
    fresh = type(conv)(
        conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, dilation=conv.dilation, groups=conv.groups
    ).double()
    fresh.weight.data.copy_(
        torch.randn(conv.weight.shape, generator=torch.Generator().manual_seed(index), dtype=torch.float64)
    )
    return fresh, 5 if isinstance(conv, nn.Conv3d) else 8


class _Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.inlet, self.inner = nn.Conv2d(1, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1, bias=False)

    def forward(self, x):
        h = torch.tanh(self.inlet(x))
        return torch.tanh(self.inner(h))


class TestSoft(LayerTestCase):
    def layer(self):
        model = _Recurrent()
        apply(model, "stable-rank-norm", alpha=1.5, beta=0.2, size=4)
        return model

    def inputs(self, samples):
        return (torch.randn(samples, 1, 4, 4, generator=torch.Generator().manual_seed(0)),)


@pytest.mark.parametrize("index", range(len(CASES)))
@pytest.mark.parametrize("beta", [1.0, 0.15])
def test_spectral_norm_of_the_operator_is_alpha(index, beta):
    conv, size = _conv(index)
    apply(conv, "stable-rank-norm", alpha=0.7, beta=beta, size=size)
    assert singular_values(conv, size)[0] == pytest.approx(0.7, rel=2e-3)


@pytest.mark.parametrize("index", range(len(CASES)))
def test_stable_rank_of_the_operator_is_bounded(index):
    conv, size = _conv(index)
    before = singular_values(conv, size)
    share = (before**2).sum() / before[0] ** 2 / len(before)
    free, _ = _conv(index)
    apply(free, "stable-rank-norm", size=size)
    torch.testing.assert_close(free.weight, conv.weight / before[0], rtol=2e-3, atol=1e-9)
    # With few filters K1 alone has a larger stable rank than 0.6 of this.
    beta = round((0.9 if index in (1, 6) else 0.6) * share, 3)
    apply(conv, "stable-rank-norm", beta=beta, size=size)
    values = singular_values(conv, size)
    found = (values**2).sum() / values[0] ** 2 / len(values)
    assert found <= beta * 1.005
    assert found >= 0.4 * beta  # it is not shrunk to nothing


def test_a_bound_that_holds_already_changes_only_the_scale():
    conv, size = _conv(2)
    before = conv.weight.detach().clone()
    apply(conv, "stable-rank-norm", beta=0.99, size=size)
    ratio = conv.weight / before
    torch.testing.assert_close(ratio, ratio.mean().expand_as(ratio))


def test_equals_stable_rank_normalization_of_matrices():
    """A 1 x 1 kernel on one pixel is a matrix: W1 + gamma W2 with gamma = sqrt(r - 1) sigma / |W2| (Sanyal et al.)."""
    conv = nn.Conv2d(6, 5, 1, dtype=torch.float64)
    matrix = conv.weight.detach().flatten(1).numpy()
    u, s, v = np.linalg.svd(matrix)
    first = s[0] * np.outer(u[:, 0], v[0])
    rank = 0.3 * 5
    gamma = np.sqrt(rank - 1) * s[0] / np.linalg.norm(matrix - first)
    assert gamma < 1
    apply(conv, "stable-rank-norm", beta=0.3, size=1)
    expected = (first + gamma * (matrix - first)) / s[0]
    np.testing.assert_allclose(conv.weight.detach().flatten(1).numpy(), expected, atol=2e-3)
    values = np.linalg.svd(conv.weight.detach().flatten(1).numpy(), compute_uv=False)
    assert (values**2).sum() / values[0] ** 2 == pytest.approx(rank, rel=1e-3)


def test_stays_normalised_in_training():
    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1))
    apply(model, "stable-rank-norm", beta=0.25, size=6)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.003)
    x = torch.randn(8, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    weight = model[2].weight.detach().clone()
    for _ in range(100):
        optimizer.zero_grad()
        (model(x) - x.flip(2)).square().mean().backward()
        optimizer.step()
    model(x)
    model.eval()
    assert (model[2].weight - weight).abs().max() > 0.01
    values = singular_values(model[2], 6)
    assert values[0] == pytest.approx(1, rel=0.02)
    assert (values**2).sum() / values[0] ** 2 / len(values) <= 0.25 * 1.03


def test_one_iteration_per_training_forward_and_none_in_evaluation():
    conv, _ = _conv(2)
    apply(conv, "stable-rank-norm", size=8)
    norm = conv.parametrizations.weight[0]
    before = norm.image.clone()
    conv.eval()
    _ = conv.weight
    assert torch.equal(norm.image, before)
    conv.train()
    with torch.no_grad():
        conv.parametrizations.weight.original += 0.5
    _ = conv.weight
    assert not torch.equal(norm.image, before)


def test_remove_keeps_the_function():
    conv, _ = _conv(2)
    apply(conv, "stable-rank-norm", beta=0.3, size=8)
    x = torch.randn(1, 2, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = conv.eval()(x)
    assert remove(conv, "stable-rank-norm").changes == {"": "weight merged"}
    assert not parametrize.is_parametrized(conv)
    torch.testing.assert_close(conv(x), expected)


def test_shared_and_skipped_weights_stay():
    model = nn.Sequential(nn.Conv2d(2, 2, 3), nn.Conv2d(2, 2, 3), nn.Conv2d(2, 2, 3), nn.Conv2d(2, 2, 3))
    model[1].weight = model[0].weight
    assert apply(model, "stable-rank-norm", skip="3").changes.keys() == {"2"}


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: StableRankNorm(nn.Linear(2, 2)), "got Linear"),
        (lambda: StableRankNorm(nn.Conv2d(1, 1, 3), alpha=0.0), "alpha must be above 0"),
        (lambda: StableRankNorm(nn.Conv2d(1, 1, 3), beta=1.5), "beta must be above 0 and at most 1"),
        (lambda: StableRankNorm(nn.Conv2d(1, 1, 5), size=2), "size must be at least"),
        (lambda: StableRankNorm(nn.Conv2d(1, 1, 3, device="meta")), "on the meta device"),
        (lambda: apply(nn.Linear(1, 1), "stable-rank-norm"), "no convolution to change"),
    ],
)
def test_wrong_arguments(call, text):
    with pytest.raises(UsageError, match=text):
        call()


def test_zero_weight_is_refused():
    conv = nn.Conv2d(1, 1, 3)
    nn.init.zeros_(conv.weight)
    with pytest.raises(UsageError, match="finite and not zero"):
        StableRankNorm(conv)
