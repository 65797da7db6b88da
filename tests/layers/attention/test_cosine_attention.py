"""Scaled cosine attention against plain loops, at its bound, and in models that are changed."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from trimtab.errors import UsageError
from trimtab.layers import CosineAttention, LogCPB, scaled_cosine_attention
from trimtab.remedy import apply, remove
from trimtab.testing import LayerTestCase
from trimtab.workloads.transformer import Block, CausalSelfAttention


def _randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class TestCosineAttention(LayerTestCase):
    def layer(self):
        return CosineAttention(8, 2, position_bias=LogCPB((2, 3), 2, hidden=8))

    def inputs(self, samples):
        return (_randn(samples, 6, 8),)


class TestAppliedCausal(LayerTestCase):
    def layer(self):
        block = Block(8, CausalSelfAttention(8, 2))
        apply(block, "cosine-attention")
        return block

    def inputs(self, samples):
        return (_randn(samples, 4, 8),)


def _loops(q, k, v, log_scales, bias, causal, max_scale):
    """One head after the other, one pair of positions after the other."""
    out = np.zeros_like(v)
    for b, h, i in np.ndindex(v.shape[:3]):
        seen = range(i + 1) if causal else range(v.shape[2])
        logits = []
        for j in seen:
            query, key = q[b, h, i], k[b, h, j]
            cosine = sum(query * key) / (math.sqrt(sum(query**2)) * math.sqrt(sum(key**2)))
            logits.append(cosine * min(math.exp(log_scales[h]), max_scale) + bias[h, i, j])
        weights = [math.exp(logit - max(logits)) for logit in logits]
        for j, weight in zip(seen, weights, strict=True):
            out[b, h, i] += weight / sum(weights) * v[b, h, j]
    return out


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_equals_plain_loops(causal, with_bias):
    random = np.random.default_rng(0)
    q, k, v = random.normal(size=(3, 2, 3, 4, 5)) * 7
    log_scales, bias = np.array([0.0, 2.0, 6.0]), random.normal(size=(3, 4, 4)) * with_bias
    y = scaled_cosine_attention(
        *(torch.tensor(part) for part in (q, k, v, log_scales)),
        max_scale=50.0,
        bias=torch.tensor(bias) if with_bias else None,
        causal=causal,
    )
    np.testing.assert_allclose(y, _loops(q, k, v, log_scales, bias, causal, 50.0), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("factor", [1e-3, 1.0, 1e4])
@pytest.mark.parametrize("log_scale", [0.0, 3.0, 20.0])
def test_logits_are_bounded(factor, log_scale):
    """With values that are one-hot, outputs are the weights: no ratio of two exceeds exp(2 / tau)."""
    layer = CosineAttention(8, 2, bias=False)
    layer.logit_scale.data.fill_(log_scale)
    layer.qkv.weight.data.mul_(factor)
    q, k, _ = layer.qkv(_randn(3, 6, 8)).double().view(3, 6, 3, 2, 4).permute(2, 0, 3, 1, 4)
    weights = scaled_cosine_attention(q, k, torch.eye(6, dtype=torch.float64), layer.logit_scale.double())
    bound = min(math.exp(log_scale), 100.0)
    logits = weights.log()
    assert (logits.amax(-1) - logits.amin(-1)).max() <= 2 * bound * (1 + 1e-9)
    assert (logits.amax(-1) - logits.amin(-1)).max() >= 0.5 * bound


def test_a_temperature_at_its_bound_is_not_driven_further():
    layer = CosineAttention(8, 2)
    layer.logit_scale.data.copy_(torch.tensor([9.0, 1.0]))
    layer(_randn(2, 4, 8)).square().sum().backward()
    assert layer.logit_scale.grad[0] == 0
    assert layer.logit_scale.grad[1] != 0


def test_zero_queries_attend_evenly_and_have_finite_gradients():
    q = torch.zeros(1, 2, 3, 4, requires_grad=True)
    v = _randn(1, 2, 3, 4)
    y = scaled_cosine_attention(q, q, v, torch.zeros(2))
    y.sum().backward()
    torch.testing.assert_close(y, v.mean(-2, keepdim=True).expand_as(v))
    assert q.grad.isfinite().all()


def test_bfloat16_cosines_are_taken_in_float32():
    q, k, v = (_randn(2, 2, 5, 8, seed=seed).bfloat16() for seed in range(3))
    y = scaled_cosine_attention(q, k, v, torch.full((2,), 2.0))
    exact = scaled_cosine_attention(q.double(), k.double(), v.double(), torch.full((2,), 2.0, dtype=torch.float64))
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), exact, atol=0.02, rtol=0.02)


def test_apply_and_remove():
    torch.manual_seed(0)
    model = nn.Sequential(*(Block(8, CausalSelfAttention(8, 2)) for _ in range(2)))
    x = _randn(2, 4, 8)
    expected, text, keys = model(x), repr(model), list(model.state_dict())
    changes = apply(model, "cosine-attention", scale=5.0).changes
    assert list(changes) == ["0.attention", "1.attention"]
    assert changes["0.attention"] == "logits = cos(q, k) * s, s = 5 learned, at most 100"
    torch.testing.assert_close(model[0].attention.logit_scale.exp(), torch.full((2,), 5.0))
    assert not torch.allclose(model(x), expected)
    changed = model(x)
    changed_again = x.clone()
    changed_again[:, -1] += 1
    torch.testing.assert_close(model(changed_again)[:, :-1], changed[:, :-1])  # causal still
    with pytest.raises(UsageError, match=r"'0\.attention' is a CosineAttention already: remove that first"):
        apply(model, "cosine-attention")
    remove(model, "cosine-attention")
    assert (repr(model), list(model.state_dict())) == (text, keys)
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: CosineAttention(8, 2, scale=200.0), "0 < scale <= max_scale, got 200.0 and 100.0"),
        (lambda: CosineAttention(8, 2, scale=0.0), "0 < scale"),
        (lambda: CosineAttention(9, 2), "multiple of its 2 heads"),
        (lambda: apply(nn.Linear(2, 2), "cosine-attention"), "no attention to change in Linear. Looked for"),
        (
            lambda: scaled_cosine_attention(*(torch.ones(1, 1, 1, 2),) * 3, torch.zeros(1), max_scale=0.0),
            "max_scale must be above 0",
        ),
        (
            lambda: scaled_cosine_attention(
                *(torch.ones(1, 1, 2, 2),) * 3, torch.zeros(1), bias=torch.ones(2, 2, dtype=torch.bool).tril()
            ),
            "bias is added to the logits, got torch.bool",
        ),
    ],
)
def test_wrong_arguments(call, text):
    with pytest.raises(UsageError, match=text):
        call()


def test_a_wrong_option_changes_nothing():
    block = Block(8, CausalSelfAttention(8, 2))
    before = repr(block)
    with pytest.raises(UsageError, match="0 < scale"):
        apply(block, "cosine-attention", scale=-1.0)
    assert repr(block) == before
