"""LS-attention: windows against the mask and plain loops, what they cost, and models that get it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from trimtab.errors import UsageError
from trimtab.layers import LongShortAttention, windowed_attention
from trimtab.layers._self_attention import SelfAttention
from trimtab.remedy import apply, remove
from trimtab.testing import LayerTestCase
from trimtab.watch.lens import Lens
from trimtab.workloads import workload


def _input(*shape, dtype=torch.float64, seed=1):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


class TestLongShortAttention(LayerTestCase):
    def layer(self):
        return LongShortAttention(8, 2, causal=True, window=2)

    def inputs(self, samples):
        return (_input(samples, 5, 8, dtype=torch.float32),)


class TestApplied(TestLongShortAttention):
    def layer(self):
        model = nn.Sequential(SelfAttention(8, 4, causal=False), nn.Linear(8, 8))
        apply(model, "ls-attention", window=2, long_heads=2)
        return model


def _mask(length, window, causal):
    i, j = torch.arange(length)[:, None], torch.arange(length)
    return (i - j < window) & ((j <= i) if causal else (j - i < window))


@given(
    length=st.integers(1, 23),
    window=st.integers(1, 9),
    causal=st.booleans(),
    shape=st.tuples(st.integers(0, 2), st.integers(1, 3), st.integers(1, 4)),
    scale=st.sampled_from([0.0, 1.0, 30.0]),
)
def test_windowed_equals_masked_attention(length, window, causal, shape, scale):
    """Values and gradients of the chunks are those of full attention under the mask, to 1e-6 in float32."""
    batch, heads, width = shape
    parts = [_input(batch, heads, length, width, dtype=torch.float32, seed=seed) for seed in range(3)]
    parts[0] *= scale
    ours, theirs = ([part.clone().requires_grad_() for part in parts] for _ in range(2))
    result = windowed_attention(*ours, window=window, causal=causal)
    expected = F.scaled_dot_product_attention(*theirs, attn_mask=_mask(length, window, causal))
    torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-6)
    for left, right in zip(
        torch.autograd.grad(result.square().sum(), ours),
        torch.autograd.grad(expected.square().sum(), theirs),
        strict=True,
    ):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5 * max(1.0, scale))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("long_heads", [0, 1, 3])
def test_equals_plain_loops(causal, long_heads):
    """Heads 0 to H - long_heads - 1 see i - j < window, the others what they always did."""
    layer = LongShortAttention(6, 3, causal=causal, window=3, long_heads=long_heads).double()
    x = _input(2, 8, 6)
    out = np.zeros(x.shape)
    for b in range(2):
        weight = layer.qkv.weight.detach().numpy()
        q, k, v = ((x[b].numpy() @ weight.T).reshape(8, 3, 3, 2)[:, part] for part in range(3))
        for h in range(3):
            for i in range(8):
                seen = [j for j in range(8) if not causal or j <= i]
                if h < 3 - long_heads:
                    seen = [j for j in seen if abs(i - j) < 3]
                p = np.array([math.exp(q[i, h] @ k[j, h] / math.sqrt(2)) for j in seen])
                out[b, i, 2 * h : 2 * h + 2] = p / p.sum() @ v[seen, h]
    expected = out @ layer.proj.weight.detach().numpy().T
    np.testing.assert_allclose(layer(x).detach().numpy(), expected, atol=1e-12)


def test_cost_against_the_mask():
    """Multiplications of the core grow with 2 W a query in place of L; no tensor of L x L is made."""
    length, window, parts = 512, 32, [_input(1, 2, 512, 8, dtype=torch.float32, seed=seed) for seed in range(3)]

    def flops(call):
        with FlopCounterMode(display=False) as counter:
            call()
        return counter.get_total_flops()

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        local = flops(lambda: windowed_attention(*parts, window=window))
        masked = flops(lambda: F.scaled_dot_product_attention(*parts, attn_mask=_mask(length, window, True)))
    assert local * length == masked * 2 * window


def test_a_token_changes_only_what_its_window_reaches():
    layer = LongShortAttention(8, 2, causal=True, window=3, long_heads=0)
    x = _input(1, 12, 8, dtype=torch.float32)
    moved = x.clone()
    moved[0, 4] += 1
    changed = (layer(moved) != layer(x)).any(dim=-1)[0]
    assert changed.tolist() == [4 <= i < 7 for i in range(12)]


def test_a_watch_sees_every_head():
    """Its largest logits are those that each head has under its own mask."""
    layer = LongShortAttention(8, 4, causal=True, window=2)
    x, seen = _input(3, 7, 8, dtype=torch.float32), []
    with Lens(lambda: "", lambda name, attention: seen.append(attention), lambda *activation: None):
        layer(x)
    q, k, _ = layer.qkv(x).view(3, 7, 3, 4, 2).permute(2, 0, 3, 1, 4)
    logits = q @ k.transpose(-2, -1) / math.sqrt(2)
    short = logits[:, :3].masked_fill(~_mask(7, 2, True), -math.inf).amax((0, 2, 3))
    long = logits[:, 3:].masked_fill(~_mask(7, 7, True), -math.inf).amax((0, 2, 3))
    found = [attention.logits.amax((0, 2, 3)) for attention in seen]
    torch.testing.assert_close(found[1], long)
    # The padding of the last chunk is all zeros, and so are the logits there.
    torch.testing.assert_close(found[0], short.clamp(min=0))


@pytest.mark.parametrize("name", ["lm-small", "digits-vit"])
def test_workloads(name):
    job = workload(name)
    model = job.model(0, depth=1)
    assert apply(model, "ls-attention", window=4).changes == {
        "blocks.0.attention": "3 heads of window 4, 1 that see everything"
    }
    tokens = job.batch(0, 0, 2)[0]
    changed = model(tokens)
    remove(model, "ls-attention")
    plain = job.model(0, depth=1)
    assert repr(model) == repr(plain)
    torch.testing.assert_close(model.eval()(tokens), plain.eval()(tokens))
    assert not torch.allclose(changed, model(tokens))


@pytest.mark.parametrize(
    ("model", "options", "text"),
    [
        (nn.Linear(4, 4), {}, "no attention to change in Linear. Looked for"),
        (SelfAttention(8, 2, causal=True), {"window": 0}, "window must be at least 1, got 0"),
        (SelfAttention(8, 2, causal=True), {"long_heads": 3}, r"long_heads must be in \[0, 2\]"),
        (nn.ModuleList([SelfAttention(8, 4, causal=True), SelfAttention(8, 2, causal=True)]), {"long_heads": 3}, "'1'"),
    ],
)
def test_wrong_uses_change_nothing(model, options, text):
    before = repr(model)
    with pytest.raises(UsageError, match=text):
        apply(model, "ls-attention", **options)
    assert repr(model) == before


def test_wrong_arguments():
    with pytest.raises(UsageError, match=r"long_heads must be in \[0, 2\], the heads there are, got -1"):
        LongShortAttention(8, 2, causal=True, long_heads=-1)
    with pytest.raises(UsageError, match="window must be at least 1"):
        windowed_attention(*[torch.zeros(1, 1, 2, 2)] * 3, window=0)
