"""QK-norm against attention of transformers that has it built in, with the same weights."""

from __future__ import annotations

import importlib
import warnings

import pytest
import torch

from trimtab.remedy import apply

pytest.importorskip("transformers")
_WIDTH, _HEADS, _KEY_HEADS, _LENGTH = 32, 4, 2, 6


def _load(family):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = importlib.import_module(f"transformers.models.{family}.configuration_{family}")
        return config, importlib.import_module(f"transformers.models.{family}.modeling_{family}")


def _run(attention, rotary):
    """Run with random projections, causally, through transformers' eager attention."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, _LENGTH, _WIDTH, generator=generator, dtype=torch.float64)
    positions = rotary(x, torch.arange(_LENGTH)[None])
    mask = torch.full((1, 1, _LENGTH, _LENGTH), -torch.inf, dtype=torch.float64).triu(1)
    return attention.eval()(x, position_embeddings=positions, attention_mask=mask)[0]


def _pair(kind, with_norm, without, layer=0):
    torch.manual_seed(0)
    theirs, ours = kind(with_norm, layer).double(), kind(without, layer).double()
    for parameter in theirs.parameters():
        parameter.data.normal_()
    missing = ours.load_state_dict(theirs.state_dict(), strict=False)
    assert not missing.missing_keys
    assert missing.unexpected_keys
    return theirs, ours


def _common(**options):
    return {
        "hidden_size": _WIDTH,
        "intermediate_size": 16,
        "num_attention_heads": _HEADS,
        "num_key_value_heads": _KEY_HEADS,
        "vocab_size": 8,
        "attn_implementation": "eager",
        **options,
    }


def test_equals_stablelm():
    """LayerNorm without bias on each head; StableLM has a gain for each head, here all equal."""
    configuration, modeling = _load("stablelm")
    on, off = (
        configuration.StableLmConfig(**_common(qk_layernorm=value, layer_norm_eps=1e-6)) for value in (True, False)
    )
    theirs, ours = _pair(modeling.StableLmAttention, on, off)
    gains = torch.rand(2, _WIDTH // _HEADS, dtype=torch.float64) + 0.5
    for gain, norms in zip(gains, (theirs.q_layernorm.norms, theirs.k_layernorm.norms), strict=True):
        for norm in norms:
            norm.weight.data.copy_(gain)
    rotary = modeling.StableLmRotaryEmbedding(on)
    before = _run(ours, rotary)
    apply(ours, "qk-norm")
    ours.q_proj.qk_norm.weight.data.copy_(gains[0])
    ours.k_proj.qk_norm.weight.data.copy_(gains[1])
    expected = _run(theirs, rotary)
    torch.testing.assert_close(_run(ours, rotary), expected)
    assert not torch.allclose(before, expected, rtol=0.01)


def test_equals_phi():
    """LayerNorm with bias, one for all heads."""
    configuration, modeling = _load("phi")
    on, off = (configuration.PhiConfig(**_common(qk_layernorm=value, layer_norm_eps=1e-5)) for value in (True, False))
    theirs, ours = _pair(modeling.PhiAttention, on, off)
    rotary = modeling.PhiRotaryEmbedding(on)
    before = _run(ours, rotary)
    apply(ours, "qk-norm", bias=True, eps=1e-5)
    ours.q_proj.qk_norm.load_state_dict(theirs.q_layernorm.state_dict())
    ours.k_proj.qk_norm.load_state_dict(theirs.k_layernorm.state_dict())
    expected = _run(theirs, rotary)
    torch.testing.assert_close(_run(ours, rotary), expected)
    assert not torch.allclose(before, expected, rtol=0.01)


def test_equals_qwen3():
    """RMSNorm on each head: Qwen3's attention, and Llama's (which has none) with ours."""
    configuration, modeling = _load("qwen3")
    qwen = configuration.Qwen3Config(**_common(head_dim=_WIDTH // _HEADS, rms_norm_eps=1e-6))
    torch.manual_seed(0)
    theirs = modeling.Qwen3Attention(qwen, 0).double()
    for parameter in theirs.parameters():
        parameter.data.normal_()
    llama_configuration, llama = _load("llama")
    ours = llama.LlamaAttention(llama_configuration.LlamaConfig(**_common(head_dim=_WIDTH // _HEADS)), 0).double()
    ours.load_state_dict({name: value for name, value in theirs.state_dict().items() if "norm" not in name})
    rotary = modeling.Qwen3RotaryEmbedding(qwen)
    before = _run(ours, rotary)
    apply(ours, "qk-norm", kind="rms")
    ours.q_proj.qk_norm.load_state_dict(theirs.q_norm.state_dict())
    ours.k_proj.qk_norm.load_state_dict(theirs.k_norm.state_dict())
    expected = _run(theirs, rotary)
    # Qwen3's norm computes in float32 whatever its input.
    torch.testing.assert_close(_run(ours, rotary), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(before, expected, rtol=0.01)


@pytest.mark.parametrize(
    ("family", "kind", "options", "changes"),
    [
        ("gpt2", "GPT2Model", {"n_embd": 12, "n_head": 3, "n_layer": 2, "n_positions": 8}, 2),
        ("bert", "BertModel", {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 3}, 2),
        ("distilbert", "DistilBertModel", {"dim": 12, "n_layers": 2, "n_heads": 3, "hidden_dim": 16}, 2),
        ("llama", "LlamaModel", {"num_hidden_layers": 2, **_common()}, 2),
    ],
)
def test_changes_whole_models(family, kind, options, changes):
    configuration, modeling = _load(family)
    config_name = kind.replace("Model", "Config")
    torch.manual_seed(0)
    model = getattr(modeling, kind)(getattr(configuration, config_name)(**{"vocab_size": 11, **options})).eval()
    tokens = torch.arange(6)[None]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.5)
        before = model(tokens)[0]
        applied = apply(model, "qk-norm")
        after = model(tokens)[0]
    assert len(applied.changes) == changes
    assert after.isfinite().all()
    assert not torch.allclose(before, after, rtol=0.01)
