"""Residual post-norm put into pre-norm models, against its equation and OLMo 2."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from trimtab.errors import UsageError
from trimtab.remedy import apply, remove
from trimtab.testing import LayerTestCase
from trimtab.workloads.transformer import Block, CausalSelfAttention


def _randn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


class TestBlocks(LayerTestCase):
    def layer(self):
        model = nn.Sequential(*(Block(8, CausalSelfAttention(8, 2)) for _ in range(2)))
        apply(model, "res-post-norm", gain=0.5)
        return model

    def inputs(self, samples):
        return (_randn(samples, 4, 8),)


class TestEncoderLayer(LayerTestCase):
    def layer(self):
        model = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, norm_first=True)
        apply(model, "res-post-norm", gain=0.5)
        return model

    def inputs(self, samples):
        return (_randn(samples, 4, 8),)


def _norm(x, norm):
    centered = x - x.mean(-1, keepdim=True)
    return centered / (centered.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight + norm.bias


def test_a_changed_block_equals_the_equation():
    torch.manual_seed(0)
    plain = Block(8, CausalSelfAttention(8, 2)).double()
    block = copy.deepcopy(plain)
    changes = apply(block, "res-post-norm").changes
    assert changes == dict.fromkeys(["attention", "mlp.2"], "LayerNorm moved behind it, gain = 0")
    norms = (block.attention.res_post_norm, block.mlp[2].res_post_norm)
    for norm in norms:
        norm.weight.data.normal_()
        norm.bias.data.normal_()
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    y = x + _norm(plain.attention(x), norms[0])
    torch.testing.assert_close(block(x), y + _norm(plain.mlp(y), norms[1]))


def test_blocks_start_as_the_identity():
    torch.manual_seed(0)
    for module in (
        Block(8, CausalSelfAttention(8, 2)),
        nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, norm_first=True),
    ):
        apply(module, "res-post-norm")
        x = _randn(2, 5, 8)
        assert torch.equal(module(x), x)
        with torch.no_grad():
            assert torch.equal(module.eval()(x), x)  # the fused inference path is not taken


def test_equals_olmo2():
    """OLMo 2's layer is residual post-norm with RMSNorm (and QK-norm, which is set to do nothing here)."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
    more = {"vocab_size": 11, "num_hidden_layers": 1, "attn_implementation": "eager", "pad_token_id": 0}
    torch.manual_seed(0)
    olmo = transformers.Olmo2Model(transformers.Olmo2Config(**sizes, **more, rms_norm_eps=1e-6)).eval()
    llama = transformers.LlamaModel(transformers.LlamaConfig(**sizes, **more, rms_norm_eps=1e-6)).eval()
    theirs, ours = olmo.layers[0], llama.layers[0]
    theirs.self_attn.q_norm, theirs.self_attn.k_norm = nn.Identity(), nn.Identity()
    ours.self_attn.load_state_dict(theirs.self_attn.state_dict())
    ours.mlp.load_state_dict(theirs.mlp.state_dict())
    apply(llama, "res-post-norm")
    for mine, its in (
        (ours.self_attn.res_post_norm, theirs.post_attention_layernorm),
        (ours.mlp.res_post_norm, theirs.post_feedforward_layernorm),
    ):
        its.weight.data.normal_()
        mine.weight.data.copy_(its.weight)
    x = _randn(2, 5, 16)
    expected = olmo(inputs_embeds=x).last_hidden_state
    torch.testing.assert_close(llama(inputs_embeds=x).last_hidden_state, expected, atol=1e-5, rtol=1e-5)


def test_remove_restores_structure_and_fresh_norms():
    torch.manual_seed(0)
    layers = [Block(8, CausalSelfAttention(8, 2)), nn.TransformerDecoderLayer(8, 2, 16, 0.0, norm_first=True)]
    for layer in layers:
        text, state = repr(layer), copy.deepcopy(layer.state_dict())
        apply(layer, "res-post-norm")
        remove(layer, "res-post-norm")
        assert repr(layer) == text
        assert layer.state_dict().keys() == state.keys()
        assert all(torch.equal(value, state[name]) for name, value in layer.state_dict().items())
        with pytest.raises(UsageError, match="nothing to remove"):
            remove(layer, "res-post-norm")


def test_a_norm_that_went_with_its_sublayer_is_named():
    model = nn.Sequential(Block(8, CausalSelfAttention(8, 2)))
    apply(model, "res-post-norm")
    model[0].mlp[2] = nn.Linear(32, 8)
    before = repr(model)
    with pytest.raises(UsageError, match=r"another method replaced '0\.mlp\.2' and its norm with it"):
        remove(model, "res-post-norm")
    assert repr(model) == before


def test_the_norms_are_the_model_s_own_parameters():
    block = Block(8, CausalSelfAttention(8, 2))
    before = {id(parameter) for parameter in block.parameters()}
    apply(block, "res-post-norm")
    assert {id(parameter) for parameter in block.parameters()} == before


def test_one_placement_at_a_time():
    block = Block(8, CausalSelfAttention(8, 2))
    apply(block, "peri-ln")
    with pytest.raises(UsageError, match="'attention' is normalised already, by its peri_norm"):
        apply(block, "res-post-norm")
    remove(block, "peri-ln")
    apply(block, "res-post-norm")
    for method in ("res-post-norm", "peri-ln"):
        with pytest.raises(UsageError, match=r"has no gain|by its res_post_norm"):
            apply(block, method)


@pytest.mark.parametrize("gain", [-1.0, float("inf"), float("nan")])
def test_wrong_gain(gain):
    with pytest.raises(UsageError, match="gain must be at least 0 and finite"):
        apply(Block(8, CausalSelfAttention(8, 2)), "res-post-norm", gain=gain)
