"""Peri-LN put into pre-LN models of every recognised shape, against its equation and Gemma 2."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from trimtab.errors import UsageError
from trimtab.remedy import apply, remove
from trimtab.testing import LayerTestCase
from trimtab.workloads.lm import LanguageModel
from trimtab.workloads.transformer import Block, CausalSelfAttention


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


def _blocks(count=2, width=8):
    return nn.Sequential(*(Block(width, CausalSelfAttention(width, 2)) for _ in range(count)))


class _Case(LayerTestCase):
    def inputs(self, samples):
        return (torch.randn(samples, 4, 8, generator=_generator()),)


class TestBlocks(_Case):
    def layer(self):
        model = _blocks()
        apply(model, "peri-ln", embedding_norm=True)
        return model


class TestEncoderLayer(_Case):
    def layer(self):
        model = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, norm_first=True)
        apply(model, "peri-ln")
        return model


def _numpy_free_norm(x, norm):
    centered = x - x.mean(-1, keepdim=True)
    return centered / (centered.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight + norm.bias


def test_a_changed_block_equals_the_equation():
    torch.manual_seed(0)
    plain = Block(8, CausalSelfAttention(8, 2)).double()
    block = copy.deepcopy(plain)
    assert list(apply(block, "peri-ln").changes) == ["attention", "mlp.2"]
    for norm in (block.attention.peri_norm, block.mlp[2].peri_norm):
        norm.weight.data.normal_()
        norm.bias.data.normal_()
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    y = x + _numpy_free_norm(plain.attention(_numpy_free_norm(x, plain.norm1)), block.attention.peri_norm)
    y = y + _numpy_free_norm(plain.mlp(_numpy_free_norm(y, plain.norm2)), block.mlp[2].peri_norm)
    torch.testing.assert_close(block(x), y)


@pytest.mark.parametrize("factor", [1.0, 100.0])
def test_the_stream_grows_linearly_whatever_the_weights(factor):
    """Each of a block's two branches adds a variance of 1: after l blocks at most (sqrt(v0) + 2 l)^2 if all align."""
    torch.manual_seed(0)
    model = _blocks(24, 64)
    for block in model:
        block.mlp[2].weight.data.mul_(factor)
        block.attention.proj.weight.data.mul_(factor)
    x = torch.randn(4, 16, 64, generator=_generator())

    def variances():
        stream, found = x, []
        for block in model:
            stream = block(stream)
            found.append(stream.var(-1, correction=0).mean().item())
        return found

    pre = variances()
    apply(model, "peri-ln")
    peri = variances()
    assert peri[-1] == pytest.approx(1 + 2 * 24, rel=0.25)
    assert peri[11] == pytest.approx(1 + 2 * 12, rel=0.25)
    assert (pre[-1] > 100 * peri[-1]) == (factor > 1)


def test_equals_gemma2():
    """Gemma 2's layer is Peri-LN: its two more norms do what ours do, here with Llama's layer changed."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
    more = {"head_dim": 8, "vocab_size": 11, "num_hidden_layers": 1, "attn_implementation": "eager"}
    gemma = transformers.Gemma2Model(
        transformers.Gemma2Config(
            **sizes,
            **more,
            hidden_activation="silu",
            attn_logit_softcapping=None,
            query_pre_attn_scalar=8,
            sliding_window=64,
        )
    ).eval()
    llama = transformers.LlamaModel(transformers.LlamaConfig(**sizes, **more, rms_norm_eps=1e-6)).eval()
    assert list(apply(llama, "peri-ln").changes) == ["layers.0.self_attn", "layers.0.mlp"]
    theirs, ours = gemma.layers[0], llama.layers[0]
    ours.self_attn.load_state_dict({**theirs.self_attn.state_dict(), "peri_norm.weight": torch.ones(16)})
    ours.mlp.load_state_dict({**theirs.mlp.state_dict(), "peri_norm.weight": torch.ones(16)})
    for mine, its in (
        (ours.input_layernorm, theirs.input_layernorm),
        (ours.self_attn.peri_norm, theirs.post_attention_layernorm),
        (ours.post_attention_layernorm, theirs.pre_feedforward_layernorm),
        (ours.mlp.peri_norm, theirs.post_feedforward_layernorm),
        (llama.norm, gemma.norm),
    ):
        its.weight.data.normal_(0.0, 0.3)
        mine.weight.data.copy_(1 + its.weight)  # Gemma stores its gains less one
    x = torch.randn(2, 5, 16, generator=_generator())
    expected = gemma(inputs_embeds=x / 16**0.5 if _scales(gemma) else x).last_hidden_state
    torch.testing.assert_close(llama(inputs_embeds=x).last_hidden_state, expected, atol=1e-5, rtol=1e-5)


def _scales(gemma):
    """Return whether the model multiplies embeddings it is given by sqrt(width), as versions before 5 do."""
    seen = []
    handle = gemma.layers[0].register_forward_pre_hook(lambda layer, args: seen.append(args[0]))
    gemma(inputs_embeds=torch.ones(1, 1, 16))
    handle.remove()
    return seen[0].max().item() > 2


def test_gpt2():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_embd=8,
        n_layer=2,
        n_head=2,
        vocab_size=11,
        n_positions=8,
        initializer_range=1.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = transformers.GPT2Model(config).eval()
    tokens = torch.arange(6).view(1, 6)
    model(tokens)
    assert list(apply(model, "peri-ln").changes) == ["h.0.attn", "h.0.mlp", "h.1.attn", "h.1.mlp"]
    seen = []
    model.h[1].mlp.register_forward_hook(lambda module, args, output: seen.append(output))
    model(tokens)
    torch.testing.assert_close(seen[0].mean(-1), torch.zeros(1, 6), atol=1e-5, rtol=0)
    torch.testing.assert_close(seen[0].var(-1, correction=0), torch.ones(1, 6), atol=0.02, rtol=0)


@pytest.mark.parametrize("kind", ["Gemma2", "Olmo2"])
def test_blocks_that_normalise_outputs_already_are_left_alone(kind):
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{kind}Config")(
        hidden_size=8,
        intermediate_size=8,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_hidden_layers=1,
        vocab_size=9,
        head_dim=4,
        pad_token_id=0,
    )
    with pytest.raises(UsageError, match="no pre-norm block was found"):
        apply(getattr(transformers, f"{kind}Model")(config), "peri-ln")


class _PostNormBlock(nn.Module):
    """As Swin V2's block: pre-norm names, norms behind the sublayers."""

    def __init__(self):
        super().__init__()
        self.norm1, self.attn, self.norm2, self.mlp = nn.LayerNorm(8), nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x):
        x = x + self.norm1(self.attn(x))
        return x + self.norm2(self.mlp(x))


class _LatePostNormBlock(_PostNormBlock):
    def forward(self, x):
        x = x + self.attn(x)
        x = self.norm1(x)
        x = x + self.mlp(x)
        return self.norm2(x)


class _NormFirstInLines(_PostNormBlock):
    def forward(self, x):
        y = self.norm1(x)
        x = x + self.attn(y)
        y = self.norm2(x)
        return x + self.mlp(y)


def test_source_tells_pre_norm_from_post_norm():
    for block in (_PostNormBlock(), _LatePostNormBlock(), nn.TransformerEncoderLayer(8, 2, 16), nn.Linear(2, 2)):
        with pytest.raises(UsageError, match="no pre-norm block was found in"):
            apply(block, "peri-ln")
    assert list(apply(_NormFirstInLines(), "peri-ln").changes) == ["attn", "mlp"]


def test_encoder_and_decoder_layers_of_torch():
    torch.manual_seed(0)
    layer = nn.TransformerDecoderLayer(8, 2, 16, dropout=0.0, batch_first=True, norm_first=True)
    assert list(apply(layer, "peri-ln").changes) == ["self_attn", "multihead_attn", "linear2"]
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, norm_first=True),
        2,
        enable_nested_tensor=False,
    )
    apply(encoder, "peri-ln")
    x = torch.randn(2, 5, 8)
    trained = encoder(x)
    with torch.no_grad():
        torch.testing.assert_close(encoder.eval()(x), trained)  # the fused inference path is not taken


def test_embedding_norm_is_over_the_input_of_the_first_block_only():
    model = LanguageModel(8, 6, layers=2, heads=2)
    changes = apply(model, "peri-ln", embedding_norm=True).changes
    assert changes["blocks.0"] == "LayerNorm over what goes into it"
    assert "blocks.1" not in changes
    seen = []
    model.blocks[0].norm1.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(torch.arange(6).view(1, 6))
    x = (model.embedding.weight[:6] + model.position.weight)[None]
    torch.testing.assert_close(seen[0], F.layer_norm(x, (8,)))


@pytest.mark.parametrize("embedding_norm", [False, True])
def test_remove_restores_structure_and_function(embedding_norm):
    torch.manual_seed(0)
    model = _blocks()
    x = torch.randn(2, 5, 8)
    expected, text, keys = model(x), repr(model), list(model.state_dict())
    apply(model, "peri-ln", embedding_norm=embedding_norm)
    assert not torch.allclose(model(x), expected)
    with pytest.raises(UsageError, match=r"'0\.attention' is normalised already, by its peri_norm"):
        apply(model, "peri-ln")
    remove(model, "peri-ln")
    assert (repr(model), list(model.state_dict())) == (text, keys)
    torch.testing.assert_close(model(x), expected)
    with pytest.raises(UsageError, match="nothing to remove"):
        remove(model, "peri-ln")


def test_norms_take_kind_dtype_and_epsilon_of_the_model():
    block = Block(8, CausalSelfAttention(8, 2))
    block.norm1, block.norm2 = nn.RMSNorm(8, eps=1e-3), nn.LayerNorm(8, eps=1e-4, bias=False)
    block.to(torch.bfloat16)
    apply(block, "peri-ln")
    first, second = block.attention.peri_norm, block.mlp[2].peri_norm
    assert (type(first), first.eps, first.weight.dtype) == (nn.RMSNorm, 1e-3, torch.bfloat16)
    assert (type(second), second.eps, second.bias) == (nn.LayerNorm, 1e-4, None)
    block.norm1 = nn.Identity()
    with pytest.raises(UsageError, match="normalised already"):
        apply(block, "peri-ln")


@pytest.mark.parametrize("method", ["peri-ln", "res-post-norm"])
def test_blocks_that_share_a_sublayer_are_refused(method):
    model = nn.Sequential(*(Block(8, CausalSelfAttention(8, 2)) for _ in range(2)))
    model[1].mlp = model[0].mlp
    before = repr(model)
    with pytest.raises(UsageError, match=f"{method}: '1.mlp.2' and '0.mlp.2' are one module"):
        apply(model, method)
    assert repr(model) == before
    shared = nn.Sequential(*[Block(8, CausalSelfAttention(8, 2))] * 2)  # one block, twice
    assert list(apply(shared, method).changes) == ["0.attention", "0.mlp.2"]


def test_an_unknown_norm_is_refused():
    block = Block(8, CausalSelfAttention(8, 2))
    block.norm1 = nn.GroupNorm(2, 8)
    before = repr(block)
    with pytest.raises(UsageError, match="GroupNorm is neither a LayerNorm nor an RMSNorm"):
        apply(block, "peri-ln")
    assert repr(block) == before


def test_first_block_without_positional_input_is_named():
    block = Block(8, CausalSelfAttention(8, 2))
    apply(block, "peri-ln", embedding_norm=True)
    with pytest.raises(UsageError, match="embedding_norm=False"):
        block(x_BLD=torch.zeros(1, 2, 8))
