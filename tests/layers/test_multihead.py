"""nn.MultiheadAttention with QK-norm: torch's own in everything but the norm, and never bypassed."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import torch
from torch import nn

from trimtab.errors import UsageError
from trimtab.layers import QKNormMultiheadAttention
from trimtab.remedy import apply


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


def _options(batch, queries, keys, heads):
    causal = torch.ones(queries, keys, dtype=torch.bool).triu(1)
    each = torch.randn(batch * heads, queries, keys, generator=_generator(5), dtype=torch.float64)
    padding = torch.zeros(batch, keys, dtype=torch.bool)
    padding[0, -1] = True
    additive = torch.zeros(batch, keys, dtype=torch.float64).masked_fill(padding, -2.5)
    return list(itertools.product([None, causal, each], [None, padding, additive]))


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"batch_first": True},
        {"bias": False},
        {"add_bias_kv": True},
        {"add_zero_attn": True, "add_bias_kv": True, "batch_first": True},
        {"kdim": 6, "vdim": 5},
    ],
    ids=str,
)
def test_without_norm_equals_torch(options, need_weights):
    """With identities for norms, every mask and option gives what nn.MultiheadAttention gives."""
    torch.manual_seed(0)
    plain = nn.MultiheadAttention(8, 2, dtype=torch.float64, **options)
    changed = copy.deepcopy(plain)
    QKNormMultiheadAttention.convert(changed, nn.Identity(), nn.Identity())
    batch, queries, keys = 3, 4, 5
    inputs = [
        torch.randn(n, batch, width, dtype=torch.float64, generator=_generator(seed))
        for seed, (n, width) in enumerate([(queries, 8), (keys, plain.kdim), (keys, plain.vdim)])
    ]
    if plain.batch_first:
        inputs = [x.transpose(0, 1) for x in inputs]
    for mask, padding in _options(batch, queries, keys, heads=2):
        for average in (True, False):
            arguments = {
                "attn_mask": mask,
                "key_padding_mask": padding,
                "need_weights": need_weights,
                "average_attn_weights": average,
            }
            for result, expected in zip(changed(*inputs, **arguments), plain(*inputs, **arguments), strict=True):
                torch.testing.assert_close(result, expected)


def test_self_attention_unbatched_and_causal_hint():
    torch.manual_seed(0)
    plain = nn.MultiheadAttention(8, 2, batch_first=True)
    changed = copy.deepcopy(plain)
    QKNormMultiheadAttention.convert(changed, nn.Identity(), nn.Identity())
    x = torch.randn(2, 5, 8, generator=_generator())
    mask = nn.Transformer.generate_square_subsequent_mask(5)
    for need_weights in (True, False):
        options = {"attn_mask": mask, "is_causal": True, "need_weights": need_weights}
        torch.testing.assert_close(changed(x, x, x, **options), plain(x, x, x, **options))
        single = changed(x[0], x[0], x[0], **options)
        torch.testing.assert_close(single, plain(x[0], x[0], x[0], **options))
    with pytest.raises(UsageError, match="is_causal is a hint about attn_mask"):
        changed(x, x, x, is_causal=True)


def _layer_norm(x):
    return (x - x.mean(axis=-1, keepdims=True)) / np.sqrt(x.var(axis=-1, keepdims=True) + 1e-6)


def test_equals_closed_form():
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2, batch_first=True, dtype=torch.float64)
    apply(attention, "qk-norm")
    attention.q_norm.weight.data.uniform_(0.5, 2, generator=_generator())
    x = torch.randn(1, 5, 8, dtype=torch.float64, generator=_generator())
    w = {name: value.detach().numpy() for name, value in attention.state_dict().items()}
    q, k, v = np.split(x[0].numpy() @ w["in_proj_weight"].T + w["in_proj_bias"], 3, axis=-1)
    heads = []
    for h in (slice(0, 4), slice(4, 8)):
        q_h = _layer_norm(q[:, h]) * w["q_norm.weight"]
        k_h = _layer_norm(k[:, h]) * w["k_norm.weight"]
        weights = np.exp(q_h @ k_h.T / 2)
        heads.append(weights / weights.sum(axis=-1, keepdims=True) @ v[:, h])
    expected = np.concatenate(heads, axis=-1) @ w["out_proj.weight"].T + w["out_proj.bias"]
    np.testing.assert_allclose(attention(x, x, x)[0][0].detach().numpy(), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("padded", [False, True])
def test_inference_fast_paths_do_not_bypass_the_norm(padded):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2)
    for parameter in encoder.parameters():
        parameter.data.normal_(generator=_generator())
    assert encoder.use_nested_tensor
    apply(encoder, "qk-norm")
    x = torch.randn(2, 5, 8, generator=_generator())
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2]) if padded else None
    expected = encoder(x, src_key_padding_mask=padding)
    encoder.eval()
    with torch.no_grad():
        result = encoder(x, src_key_padding_mask=padding)
    seen = ~padding if padded else torch.ones(2, 5, dtype=torch.bool)
    torch.testing.assert_close(result[seen], expected[seen])


def test_parameters_and_hooks_stay():
    attention = nn.MultiheadAttention(8, 2)
    names = set(dict(attention.named_parameters()))
    weight, calls = attention.in_proj_weight, []
    attention.register_forward_hook(lambda *_: calls.append(1))
    apply(attention, "qk-norm")
    assert attention.in_proj_weight is weight
    assert set(dict(attention.named_parameters())) == names | {"q_norm.weight", "k_norm.weight"}
    attention(*[torch.zeros(2, 1, 8)] * 3)
    assert calls == [1]


def test_parametrized_multihead_attention_is_refused():
    model = nn.MultiheadAttention(8, 2)
    apply(model, "sigma-reparam")
    with pytest.raises(UsageError, match="apply qk-norm before parametrizations"):
        apply(model, "qk-norm")
