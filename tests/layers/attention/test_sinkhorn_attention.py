"""Sinkhorn attention against scaling in plain loops, the updates of the dual problem, and its sums."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from trimtab.errors import UsageError
from trimtab.layers import SinkhornAttention, sinkhorn
from trimtab.layers._self_attention import SelfAttention
from trimtab.remedy import apply, remove
from trimtab.testing import LayerTestCase
from trimtab.workloads import workload


def _input(*shape, dtype=torch.float64, seed=1):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


class TestSinkhornAttention(LayerTestCase):
    def layer(self):
        return SinkhornAttention(8, 2, bias=True)

    def inputs(self, samples):
        return (_input(samples, 5, 8, dtype=torch.float32),)


class TestApplied(TestSinkhornAttention):
    def layer(self):
        model = nn.Sequential(SelfAttention(8, 4, causal=False), nn.Linear(8, 8))
        apply(model, "sinkhorn-attention", n_iters=6, eps=0.5)
        return model


@given(
    length=st.integers(1, 7),
    n_iters=st.integers(1, 9),
    eps=st.sampled_from([0.3, 1.0, 4.0]),
    seed=st.integers(0, 99),
)
def test_equals_scaling_in_plain_loops(length, n_iters, eps, seed):
    """Divide rows, then columns, then rows ... by their sums."""
    logits = _input(2, length, length, seed=seed)
    result = sinkhorn(logits, n_iters=n_iters, eps=eps).numpy()
    for matrix, found in zip(logits.numpy(), result, strict=True):
        k = np.exp(matrix / eps)
        for step in range(n_iters):
            for i in range(length):
                if step % 2 == 0:
                    k[i] /= k[i].sum()
                else:
                    k[:, i] /= k[:, i].sum()
        np.testing.assert_allclose(found, k, rtol=1e-10)


@pytest.mark.parametrize("n_iters", [1, 2, 3, 20])
def test_equals_the_dual_updates(n_iters):
    """The authors' form: potentials u and v of marginals 1/L, and L times the plan exp((C + u + v) / eps)."""
    eps, length = 0.7, 6
    c = _input(3, length, length)
    marginal = torch.full((3, length), 1 / length, dtype=torch.float64)
    u, v = torch.zeros_like(marginal), torch.zeros_like(marginal)
    for step in range(n_iters):
        plan = (c + u[:, :, None] + v[:, None]) / eps
        if step % 2 == 0:
            u = u + eps * (marginal.log() - plan.logsumexp(-1))
        else:
            v = v + eps * (marginal.log() - plan.logsumexp(-2))
    expected = length * ((c + u[:, :, None] + v[:, None]) / eps).exp()
    torch.testing.assert_close(sinkhorn(c, n_iters=n_iters, eps=eps), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_rows_and_columns_sum_to_one(dtype):
    p = sinkhorn(_input(8, 2, 16, 16).to(dtype), n_iters=21)
    assert p.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for dim in (-1, -2):
        assert (p.sum(dim) - 1).abs().max() < 1e-4
    # The authors' default does so for rows only.
    few = sinkhorn(_input(8, 2, 16, 16).to(dtype))
    assert (few.sum(-1) - 1).abs().max() < 1e-5
    assert 1e-2 < (few.sum(-2) - 1).abs().max() < 0.3


def test_large_logits_stay_finite():
    logits = (1e4 * _input(2, 8, 8, dtype=torch.float32)).requires_grad_()
    p = sinkhorn(logits, n_iters=10)
    p.square().sum().backward()
    assert p.isfinite().all()
    assert logits.grad.isfinite().all()


def test_one_step_is_the_softmax():
    layer, plain = SinkhornAttention(8, 2, n_iters=1).double(), SelfAttention(8, 2, causal=False).double()
    plain.load_state_dict(layer.state_dict())
    x = _input(2, 5, 8)
    torch.testing.assert_close(layer(x), plain(x))
    assert not torch.allclose(SinkhornAttention.attend(_with(layer, 3), *_parts(), x), _softmax(*_parts()), rtol=0.01)


def _with(layer, n_iters):
    layer.n_iters = n_iters
    return layer


def _parts():
    return tuple(_input(2, 2, 5, 4, seed=seed) for seed in range(3))


def _softmax(q, k, v):
    return F.scaled_dot_product_attention(q, k, v)


def test_layer_mixes_values_by_the_matrix():
    layer = SinkhornAttention(8, 2, n_iters=5, eps=2.0).double()
    q, k, v = _parts()
    p = sinkhorn(q @ k.transpose(-2, -1) / math.sqrt(4), n_iters=5, eps=2.0)
    torch.testing.assert_close(layer.attend(q, k, v, q), p @ v)


def test_permuted_tokens_are_permuted_alike():
    layer, order = SinkhornAttention(8, 2).double(), [3, 0, 4, 1, 2]
    x = _input(2, 5, 8)
    torch.testing.assert_close(layer(x[:, order]), layer(x)[:, order])


def test_workload():
    job = workload("digits-vit")
    model, pixels = job.model(0).eval(), job.batch(0, 0, 2)[0]
    expected = model(pixels)
    assert apply(model, "sinkhorn-attention").changes == dict.fromkeys(
        ["blocks.0.attention", "blocks.1.attention"], "3 Sinkhorn steps in place of the softmax, eps = 1.0"
    )
    assert not torch.equal(model(pixels), expected)
    remove(model, "sinkhorn-attention")
    assert torch.equal(model(pixels), expected)
    assert repr(model) == repr(job.model(0))


@pytest.mark.parametrize(
    ("model", "options", "text"),
    [
        (nn.Linear(4, 4), {}, "no attention to change in Linear. Looked for"),
        (SelfAttention(8, 2, causal=True), {}, "is causal, and the only doubly stochastic matrix"),
        (SelfAttention(8, 2, causal=False), {"n_iters": 0}, "n_iters must be at least 1, got 0"),
        (SelfAttention(8, 2, causal=False), {"eps": 0.0}, r"eps must be above 0, got 0\.0"),
    ],
)
def test_wrong_uses_change_nothing(model, options, text):
    before = repr(model)
    with pytest.raises(UsageError, match=text):
        apply(model, "sinkhorn-attention", **options)
    assert repr(model) == before


def test_wrong_arguments():
    with pytest.raises(UsageError, match=r"is square, got \(2, 3\)"):
        sinkhorn(torch.zeros(2, 3))
    with pytest.raises(UsageError, match="this attention is causal"):
        SinkhornAttention.convert(SelfAttention(8, 2, causal=True))
