"""QK-norm against NumPy and torch's own attention, in every shape of model that it can change."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from trimtab.errors import UsageError
from trimtab.layers import QKNorm
from trimtab.remedy import apply, remove
from trimtab.testing import LayerTestCase


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


class Attention(nn.Module):
    """Self-attention whose projections and slots are as the arguments say; 2 heads of width 4."""

    def __init__(self, projections, slots=False, key_heads=2):
        super().__init__()
        self.num_heads, self.head_dim = 2, 4
        self.names = projections
        if len(projections) == 1:
            setattr(self, projections[0], nn.Linear(8, 24))
        else:
            setattr(self, projections[0], nn.Linear(8, 8))
            setattr(self, projections[1], nn.Linear(8, 4 * key_heads))
            self.v = nn.Linear(8, 4 * key_heads)
        if slots:
            self.q_norm, self.k_norm = nn.Identity(), nn.Identity()

    def parts(self, x):
        if len(self.names) == 1:
            q, k, v = getattr(self, self.names[0])(x).chunk(3, dim=-1)
        else:
            q, k, v = getattr(self, self.names[0])(x), getattr(self, self.names[1])(x), self.v(x)
        q, k, v = (part.unflatten(-1, (-1, 4)).transpose(1, 2) for part in (q, k, v))
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k, v

    def forward(self, x):
        q, k, v = self.parts(x)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return y.transpose(1, 2).flatten(-2)


PROJECTIONS = [("q_proj", "k_proj"), ("query", "key"), ("to_q", "to_k"), ("q_lin", "k_lin"), ("qkv",), ("c_attn",)]


class _AttentionCase(LayerTestCase):
    def layer(self):
        model = self.attention()
        apply(model, "qk-norm")
        return model

    def inputs(self, samples):
        return (torch.randn(samples, 5, 8, generator=_generator()),)


class TestSlots(_AttentionCase):
    attention = staticmethod(lambda: Attention(("qkv",), slots=True))


class TestProjections(_AttentionCase):
    attention = staticmethod(lambda: Attention(("q_proj", "k_proj")))


class TestFused(_AttentionCase):
    attention = staticmethod(lambda: Attention(("qkv",)))


class TestMultihead(_AttentionCase):
    attention = staticmethod(lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True))


class TestWithSigmaReparam(_AttentionCase):
    """Both methods in one model, each applied before the other once."""

    @staticmethod
    def attention():
        model = nn.Sequential(Attention(("q_proj", "k_proj")))
        apply(model, "sigma-reparam")
        return model


class TestUnderSigmaReparam(LayerTestCase):
    def layer(self):
        model = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        apply(model, "qk-norm", kind="rms")
        apply(model, "sigma-reparam")
        return model

    def inputs(self, samples):
        return (torch.randn(samples, 5, 8, generator=_generator()),)


def _numpy_norm(x, weight, bias, eps, kind):
    centered = x - x.mean(axis=-1, keepdims=True) if kind == "layer" else x
    return centered / np.sqrt((centered**2).mean(axis=-1, keepdims=True) + eps) * weight + bias


@given(
    head_dim=st.integers(1, 9),
    heads=st.integers(1, 3),
    rows=st.integers(0, 4),
    kind=st.sampled_from(["layer", "rms"]),
    scale=st.sampled_from([1e-3, 1.0, 1e5]),
    eps=st.sampled_from([1e-6, 1e-2]),
    seed=st.integers(0, 99),
)
def test_equals_numpy_layer_norm(head_dim, heads, rows, kind, scale, eps, seed):
    random = np.random.default_rng(seed)
    norm = QKNorm(head_dim, kind, eps=eps, bias=kind == "layer", dtype=torch.float64)
    weight, bias = random.normal(size=(2, head_dim))
    norm.weight.data.copy_(torch.from_numpy(weight))
    if norm.bias is None:
        bias = 0.0
    else:
        norm.bias.data.copy_(torch.from_numpy(bias))
    x = random.normal(size=(rows, heads * head_dim)) * scale
    expected = _numpy_norm(x.reshape(rows, heads, head_dim), weight, bias, eps, kind)
    result = norm(torch.from_numpy(x)).detach().numpy()
    np.testing.assert_allclose(result, expected.reshape(x.shape), rtol=1e-9, atol=1e-9)
    split = norm(torch.from_numpy(x).view(rows, heads, head_dim)).detach().numpy()
    np.testing.assert_allclose(split, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_logits_are_bounded(kind):
    """|LN(q)| <= sqrt(K), so a scaled logit is at most sqrt(K), however large the projections grow."""
    attention = Attention(("qkv",), slots=True)
    attention.qkv.weight.data.mul_(1e4)
    x = torch.randn(3, 6, 8, generator=_generator())

    def largest():
        q, k, _ = attention.parts(x)
        return (q @ k.transpose(-2, -1)).abs().max().item() / math.sqrt(4)

    assert largest() > 1e6
    apply(attention, "qk-norm", kind=kind)
    assert largest() <= math.sqrt(4) * (1 + 1e-5)


@pytest.mark.parametrize("names", PROJECTIONS, ids="/".join)
@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_every_kind_of_site_normalizes_each_head(names, kind):
    plain = Attention(names)
    changed = copy.deepcopy(plain)
    applied = apply(changed, "qk-norm", kind=kind)
    name = {"layer": "LayerNorm", "rms": "RMSNorm"}[kind]
    assert applied.changes == {"": f"{name} over each head of queries and keys, head_dim = 4"}
    x = torch.randn(2, 5, 8, generator=_generator())
    q, k, v = plain.parts(x)
    norm = {"layer": lambda t: F.layer_norm(t, (4,), eps=1e-6), "rms": lambda t: F.rms_norm(t, (4,), eps=1e-6)}[kind]
    for part, expected in zip(changed.parts(x), (norm(q), norm(k), v), strict=True):
        torch.testing.assert_close(part, expected)


def test_keys_have_their_own_gain():
    attention = Attention(("qkv",))
    apply(attention, "qk-norm")
    x = torch.randn(2, 5, 8, generator=_generator())
    before = attention.parts(x)
    attention.qkv.qk_norm.key.weight.data.mul_(3)
    after = attention.parts(x)
    torch.testing.assert_close(after[0], before[0])
    torch.testing.assert_close(after[1], 3 * before[1])


def test_grouped_query_attention():
    attention = Attention(("q_proj", "k_proj"), key_heads=1)
    apply(attention, "qk-norm")
    q, k, _ = attention.parts(torch.randn(2, 5, 8, generator=_generator()))
    assert (q.shape[1], k.shape[1]) == (2, 1)
    for part in (q, k):
        torch.testing.assert_close(part.mean(dim=-1), torch.zeros(part.shape[:-1]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("attribute", ["num_heads", "num_attention_heads", "n_heads", "n_head", "heads"])
def test_head_count_by_any_usual_name(attribute):
    attention = nn.Module()
    attention.query, attention.key = nn.Linear(8, 12), nn.Linear(8, 12)
    setattr(attention, attribute, 3)
    assert apply(attention, "qk-norm").changes[""].endswith("head_dim = 4")


def test_slots_come_before_projections_and_are_shared_by_no_one():
    model = nn.ModuleList([Attention(("qkv",), slots=True), nn.Linear(3, 3), Attention(("qkv",), slots=True)])
    assert list(apply(model, "qk-norm").changes) == ["0", "2"]
    assert len({id(part) for layer in (model[0], model[2]) for part in (layer.q_norm, layer.k_norm)}) == 4
    assert not hasattr(model[0].qkv, "qk_norm")


@pytest.mark.parametrize("names", [*PROJECTIONS, ("multihead",), ("slots",)], ids="/".join)
def test_remove_restores_the_structure(names):
    torch.manual_seed(0)
    if names == ("multihead",):
        model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True))
    else:
        model = nn.Sequential(Attention(("qkv",), slots=True) if names == ("slots",) else Attention(names))
    x = torch.randn(2, 5, 8, generator=_generator())
    expected, text, keys = model(x), repr(model), set(model.state_dict())
    apply(model, "qk-norm")
    assert not torch.allclose(model(x), expected)
    remove(model, "qk-norm")
    assert (repr(model), set(model.state_dict())) == (text, keys)
    torch.testing.assert_close(model(x), expected)
    with pytest.raises(UsageError, match="nothing to remove"):
        remove(model, "qk-norm")


def test_norms_take_dtype_and_device_of_the_model():
    attention = Attention(("q_proj", "k_proj")).to(torch.bfloat16)
    apply(attention, "qk-norm", bias=True, eps=1e-3)
    norm = attention.q_proj.qk_norm
    assert (norm.weight.dtype, norm.bias.dtype, norm.eps) == (torch.bfloat16, torch.bfloat16, 1e-3)
    meta = nn.MultiheadAttention(8, 2, device="meta")
    apply(meta, "qk-norm")
    assert meta.q_norm.weight.is_meta


def test_float32_norm_keeps_the_dtype_of_its_input():
    x = torch.randn(3, 8, generator=_generator()).to(torch.bfloat16)
    result = QKNorm(8)(x)
    assert result.dtype == torch.bfloat16
    torch.testing.assert_close(result, F.layer_norm(x.float(), (8,), eps=1e-6).to(torch.bfloat16))


class _Functional(nn.Module):
    """As timm's BEiT: the projection's weight is used, the projection is never called."""

    def __init__(self):
        super().__init__()
        self.num_heads = 2
        self.qkv = nn.Linear(8, 24)

    def forward(self, x):
        return F.linear(input=x, weight=self.qkv.weight)


class _Interleaved(nn.Module):
    """As GPTBigCode: c_attn's output is laid out head by head, or has one key head."""

    def __init__(self):
        super().__init__()
        self.num_heads, self.multi_query = 2, False
        self.c_attn = nn.Linear(8, 24)


class _Unknown(nn.MultiheadAttention):
    def forward(self, query, key, value):
        return query


@pytest.mark.parametrize(
    "model",
    [nn.Linear(4, 4), _Functional(), _Interleaved(), _Unknown(8, 2), nn.TransformerEncoderLayer(8, 2, 16).linear1],
)
def test_a_model_without_attention_is_named(model):
    text = rf"no attention to change in {type(model).__name__}, none was found. Looked for"
    with pytest.raises(UsageError, match=text):
        apply(model, "qk-norm")


def test_applying_twice_is_refused():
    model = nn.Sequential(Attention(("qkv",)), Attention(("q_proj", "k_proj")), Attention(("qkv",), slots=True))
    model.append(nn.MultiheadAttention(8, 2))
    assert len(apply(model, "qk-norm").changes) == 4
    with pytest.raises(UsageError, match="all of its attention is normalised already"):
        apply(model, "qk-norm")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"kind": "l2"}, "unknown kind of norm 'l2'"),
        ({"eps": 0.0}, "eps must be above 0, got 0.0"),
        ({"kind": "rms", "bias": True}, "RMSNorm has no bias"),
    ],
)
def test_wrong_options_change_nothing(options, text):
    model = nn.Sequential(Attention(("qkv",), slots=True))
    before = repr(model)
    with pytest.raises(UsageError, match=text):
        apply(model, "qk-norm", **options)
    assert repr(model) == before


def test_head_dim_must_be_positive():
    with pytest.raises(UsageError, match="head_dim must be at least 1, got 0"):
        QKNorm(0)
