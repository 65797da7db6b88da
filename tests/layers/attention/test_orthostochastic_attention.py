"""QR attention against Gram-Schmidt in plain loops, its sums, and where QR has no gradient."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from trimtab.errors import UsageError
from trimtab.layers import QRAttention, qr_doubly_stochastic
from trimtab.layers._self_attention import SelfAttention
from trimtab.remedy import apply, remove
from trimtab.testing import LayerTestCase
from trimtab.workloads import workload


def _input(*shape, dtype=torch.float64, seed=1):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


class TestQRAttention(LayerTestCase):
    def layer(self):
        return QRAttention(8, 2, bias=True)

    def inputs(self, samples):
        return (_input(samples, 5, 8, dtype=torch.float32),)


class TestApplied(TestQRAttention):
    """More tokens than a head is wide."""

    def layer(self):
        model = nn.Sequential(SelfAttention(8, 4, causal=False), nn.Linear(8, 8))
        apply(model, "qr-attention", shift=2.0)
        return model


@given(length=st.integers(2, 7), shift=st.sampled_from([0.0, 0.5, 1.0]), seed=st.integers(0, 99))
def test_equals_gram_schmidt(length, shift, seed):
    """Column by column: take away what earlier columns explain, divide by the length, square."""
    m = _input(length, length, seed=seed)
    a = m.numpy() / math.sqrt((m.numpy() ** 2).mean()) + shift * np.eye(length)
    q = np.zeros_like(a)
    for j in range(length):
        column = a[:, j].copy()
        for _ in range(2):
            for i in range(j):
                column -= (q[:, i] @ column) * q[:, i]
        q[:, j] = column / math.sqrt((column**2).sum())
    np.testing.assert_allclose(qr_doubly_stochastic(m, shift=shift).numpy(), q**2, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [0.0, 1e-3, 1.0, 1e4])
def test_rows_and_columns_sum_to_one(dtype, scale):
    logits = (scale * _input(8, 2, 64, 8) @ _input(8, 2, 8, 64, seed=2)).to(dtype)
    p = qr_doubly_stochastic(logits)
    assert p.min() >= 0
    assert p.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for dim in (-1, -2):
        assert (p.sum(dim) - 1).abs().max() < 1e-5


def test_size_of_the_logits_does_not_matter():
    m = _input(2, 6, 6)
    for shift in (0.0, 1.0):
        torch.testing.assert_close(
            qr_doubly_stochastic(100 * m, shift=shift), qr_doubly_stochastic(m, shift=shift), rtol=1e-6, atol=1e-9
        )


def test_low_rank_needs_the_shift():
    """Rank-4 logits of 12 tokens: without it the result is rounding error, and its gradient as good as infinite."""
    low = _input(3, 12, 4) @ _input(3, 4, 12, seed=2)
    other = low + 1e-12 * _input(3, 12, 12, seed=3)

    def matrix_and_slope(shift):
        m = low.clone().requires_grad_()
        (qr_doubly_stochastic(m, shift=shift) * _input(3, 12, 12, seed=3)).sum().backward()
        change = qr_doubly_stochastic(other, shift=shift) - qr_doubly_stochastic(low, shift=shift)
        return change.abs().max().item(), m.grad.abs().max().item()

    change, slope = matrix_and_slope(1.0)
    assert change < 1e-10
    assert slope < 10
    change, slope = matrix_and_slope(0.0)
    assert change > 0.1
    assert not slope < 1e6


def test_one_token_sees_itself():
    logits = torch.tensor([[[-3.0]], [[0.0]], [[2.0]]], requires_grad=True)
    p = qr_doubly_stochastic(logits)
    p.sum().backward()
    assert p.flatten().tolist() == [1, 1, 1]
    assert logits.grad.flatten().tolist() == [0, 0, 0]


def test_layer_mixes_values_by_the_matrix():
    layer = QRAttention(8, 2, shift=0.5).double()
    q, k, v = (_input(2, 2, 5, 4, seed=seed) for seed in range(3))
    p = qr_doubly_stochastic(q @ k.transpose(-2, -1), shift=0.5)
    torch.testing.assert_close(layer.attend(q, k, v, q), p @ v)


def test_workload():
    job = workload("digits-vit")
    model, pixels = job.model(0).eval(), job.batch(0, 0, 2)[0]
    expected = model(pixels)
    assert apply(model, "qr-attention").changes == dict.fromkeys(
        ["blocks.0.attention", "blocks.1.attention"], "squared orthogonal factor in place of the softmax, shift = 1.0"
    )
    assert not torch.equal(model(pixels), expected)
    remove(model, "qr-attention")
    assert torch.equal(model(pixels), expected)
    assert repr(model) == repr(job.model(0))


@pytest.mark.parametrize(
    ("model", "options", "text"),
    [
        (nn.Linear(4, 4), {}, "no attention to change in Linear. Looked for"),
        (SelfAttention(8, 2, causal=True), {}, "is causal, and the only doubly stochastic matrix"),
        (SelfAttention(8, 2, causal=False), {"shift": -1.0}, r"shift must be at least 0, got -1\.0"),
    ],
)
def test_wrong_uses_change_nothing(model, options, text):
    before = repr(model)
    with pytest.raises(UsageError, match=text):
        apply(model, "qr-attention", **options)
    assert repr(model) == before


def test_wrong_arguments():
    with pytest.raises(UsageError, match=r"is square, got \(2, 3\)"):
        qr_doubly_stochastic(torch.zeros(2, 3))
    with pytest.raises(UsageError, match="this attention is causal"):
        QRAttention.convert(SelfAttention(8, 2, causal=True))
    layer = QRAttention(8, 2, shift=0.0)
    assert layer(_input(1, 4, 8, dtype=torch.float32)).isfinite().all()
    with pytest.raises(UsageError, match="logits of 5 tokens have rank 4"):
        layer(_input(1, 5, 8, dtype=torch.float32))
