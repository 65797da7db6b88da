"""Gated attention against plain loops and transformers' Qwen3-Next, in fused and in separate projections."""

from __future__ import annotations

import copy
import importlib
import math
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from trimtab.errors import UsageError
from trimtab.layers import GatedAttention, SigmoidGate
from trimtab.layers._self_attention import SelfAttention
from trimtab.remedy import apply, remove
from trimtab.testing import LayerTestCase
from trimtab.workloads import workload

POSITIONS = ("sdpa", "value", "key", "query", "output")
KINDS = [(position, kind) for position in POSITIONS for kind in ("elementwise", "headwise")][:-1]


def _input(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(1))


class Separate(nn.Module):
    """Attention of separate projections, 2 heads of width 4, as most decoders have it."""

    def __init__(self, output="o_proj"):
        super().__init__()
        self.num_heads, self.output = 2, output
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(6, 8, bias=False) for _ in range(3))
        self.q_norm = nn.LayerNorm(4)
        out = nn.Linear(8, 6, bias=False)
        setattr(self, output, nn.Sequential(out, nn.Dropout(0.0)) if output == "to_out" else out)

    def forward(self, x):
        q, k, v = (part(x).unflatten(-1, (2, 4)).transpose(1, 2) for part in (self.q_proj, self.k_proj, self.v_proj))
        y = F.scaled_dot_product_attention(self.q_norm(q), k, v, is_causal=True)
        return getattr(self, self.output)(y.transpose(1, 2).flatten(-2))


class _Case(LayerTestCase):
    width = 8

    def inputs(self, samples):
        return (_input(samples, 5, self.width, dtype=torch.float32),)


class TestGatedAttention(_Case):
    def layer(self):
        return GatedAttention(8, 2, causal=True)


class TestApplied(_Case):
    def layer(self):
        model = nn.Sequential(SelfAttention(8, 2, causal=True), nn.Linear(8, 8))
        apply(model, "gated-attention")
        return model


class TestHooked(_Case):
    width = 6

    def layer(self):
        model = nn.Sequential(Separate())
        apply(model, "gated-attention", granularity="headwise", preserve=False)
        return model


def _loops(layer, x, position):
    """The equation in plain loops: gates sigmoid(x W) on q, k, v, a head's output or the sublayer's."""
    heads, width = layer.num_heads, layer.head_dim
    weights = [part.detach().numpy() for part in (layer.qkv.weight, layer.proj.weight, layer.attention_gate.weight)]
    out = np.zeros_like(x)
    for b in range(len(x)):
        q, k, v = ((x[b] @ weights[0].T).reshape(-1, 3, heads, width)[:, part].copy() for part in range(3))
        gate = 1 / (1 + np.exp(-(x[b] @ weights[2].T)))
        each = gate.reshape(len(gate), heads, -1) if position != "output" else None
        for name, part in (("query", q), ("key", k), ("value", v)):
            if name == position:
                part *= each
        y = np.zeros_like(q)
        for i in range(len(q)):
            for h in range(heads):
                p = np.exp([q[i, h] @ k[j, h] / math.sqrt(width) for j in range(i + 1)])
                y[i, h] = p / p.sum() @ v[: i + 1, h]
        if position == "sdpa":
            y *= each
        out[b] = y.reshape(len(y), -1) @ weights[1].T * (gate if position == "output" else 1)
    return out


@pytest.mark.parametrize(("position", "granularity"), KINDS)
def test_equals_plain_loops(position, granularity):
    layer = GatedAttention(6, 2, causal=True, position=position, granularity=granularity).double()
    layer.attention_gate.weight.data.normal_()
    x = _input(2, 5, 6)
    result = layer(x).detach().numpy()
    np.testing.assert_allclose(result, _loops(layer, x.numpy(), position), atol=1e-12)


@pytest.mark.parametrize(("position", "granularity"), KINDS)
def test_preserves_the_function(position, granularity):
    """2 sigmoid(0) is 1 to the last bit, and the gate learns from there."""
    model = nn.Sequential(SelfAttention(8, 2, causal=True), nn.Linear(8, 8))
    x = _input(2, 5, 8, dtype=torch.float32)
    expected, keys, text = model(x), list(model.state_dict()), repr(model)
    changes = apply(model, "gated-attention", position=position, granularity=granularity).changes
    number = 1 + POSITIONS.index(position)
    assert changes == {"0": f"{granularity} sigmoid gate at G{number} ({position})"}
    assert torch.equal(model(x), expected)
    model(x).square().sum().backward()
    assert model[0].attention_gate.weight.grad.abs().min() > 0
    model[0].attention_gate.weight.data.normal_()
    assert not torch.allclose(model(x), expected, rtol=0.01)
    remove(model, "gated-attention")
    assert (list(model.state_dict()), repr(model)) == (keys, text)
    assert torch.equal(model(x), expected)


def test_the_papers_start():
    """W ~ N(0, 0.02): gates near 1/2."""
    gate = SigmoidGate(64, 400)
    assert 0.019 < gate.weight.std().item() < 0.021
    assert (gate(_input(50, 64, dtype=torch.float32)) - 0.5).abs().max() < 0.3
    model = nn.Sequential(SelfAttention(8, 2, causal=True))
    apply(model, "gated-attention", preserve=False)
    assert model[0].attention_gate.gain == 1
    assert model[0].attention_gate.weight.abs().min() > 0


@pytest.mark.parametrize("output", ["o_proj", "out_proj", "c_proj", "to_out"])
@pytest.mark.parametrize("granularity", ["elementwise", "headwise"])
def test_separate_projections(output, granularity):
    model = nn.Sequential(Separate(output)).double()
    x = _input(2, 5, 6)
    expected, keys, text = model(x), set(model.state_dict()), repr(model)
    apply(model, "gated-attention", granularity=granularity)
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0)
    last = getattr(model[0], output)
    last = last[0] if output == "to_out" else last
    gate = last.attention_gate.gate
    gate.weight.data.normal_()
    seen = []
    handle = last.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    result = model(x)
    handle.remove()
    gates = 2 * torch.sigmoid(x @ gate.weight.T)
    gates = gates if granularity == "elementwise" else gates.repeat_interleave(4, dim=-1)
    plain = nn.Sequential(Separate(output)).double()
    plain.load_state_dict({name: value for name, value in model.state_dict().items() if name in keys})
    inside = []
    last = getattr(plain[0], output)
    (last[0] if output == "to_out" else last).register_forward_pre_hook(lambda m, args: inside.append(args[0]))
    plain(x)
    torch.testing.assert_close(seen[0], inside[0] * gates)
    assert not torch.allclose(result, expected)
    twin = copy.deepcopy(model)
    torch.testing.assert_close(twin(x), result)
    remove(model, "gated-attention")
    assert (set(model.state_dict()), repr(model)) == (keys, text)
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0)
    torch.testing.assert_close(twin(x), result)


def test_equals_qwen3_next():
    """Qwen3-Next has the gate built in: rows of its query projection, head by head after the queries'."""
    pytest.importorskip("transformers")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        configuration = importlib.import_module("transformers.models.qwen3_next.configuration_qwen3_next")
        modeling = importlib.import_module("transformers.models.qwen3_next.modeling_qwen3_next")
    config = configuration.Qwen3NextConfig(
        hidden_size=16, num_attention_heads=4, num_key_value_heads=2, head_dim=8, attn_implementation="eager"
    )
    torch.manual_seed(0)
    theirs = modeling.Qwen3NextAttention(config, 0).double()
    ours = copy.deepcopy(theirs)
    queries, gates = theirs.q_proj.weight.detach().view(4, 2, 8, 16).unbind(1)
    # What reads twice as many rows from its query projection gets gates of sigmoid(30) = 1 from them.
    x, length = _input(2, 5, 16), 5
    positions = torch.ones(1, length, 8, dtype=torch.float64), torch.zeros(1, length, 8, dtype=torch.float64)
    mask = torch.full((1, 1, length, length), -torch.inf, dtype=torch.float64).triu(1)

    def run(attention):
        return attention.eval()(x, position_embeddings=positions, attention_mask=mask)[0]

    expected = run(theirs)
    ours.q_proj = nn.Linear(16, 64, dtype=torch.float64)
    ours.q_proj.weight.data.copy_(torch.stack([queries, torch.zeros(4, 8, 16)], 1).flatten(0, 2))
    ours.q_proj.bias.data.copy_(torch.tensor([0.0, 60.0]).repeat(4).repeat_interleave(8))
    assert apply(ours, "gated-attention", preserve=False).changes[""].startswith("elementwise")
    ours.o_proj.attention_gate.gate.weight.data.copy_(gates.flatten(0, 1))
    torch.testing.assert_close(run(ours), expected)
    remove(ours, "gated-attention")
    assert not torch.allclose(run(ours), expected, rtol=0.01)


def test_gpt2():
    """Conv1D projections of transformers' GPT-2: fused queries, keys and values."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=11, n_positions=8)
    model = transformers.GPT2Model(config).eval()
    tokens = torch.arange(6)[None]
    expected = model(tokens).last_hidden_state
    assert list(apply(model, "gated-attention").changes) == ["h.0.attn", "h.1.attn"]
    torch.testing.assert_close(model(tokens).last_hidden_state, expected)
    model.h[0].attn.c_proj.attention_gate.gate.weight.data.normal_()
    assert not torch.allclose(model(tokens).last_hidden_state, expected, rtol=0.01)


@pytest.mark.parametrize("name", ["lm-small", "digits-vit"])
def test_workloads(name):
    job = workload(name)
    model = job.model(0, depth=1)
    assert list(apply(model, "gated-attention").changes) == ["blocks.0.attention"]
    remove(model, "gated-attention")
    assert repr(model) == repr(job.model(0, depth=1))


@pytest.mark.parametrize(
    ("model", "options", "text"),
    [
        (nn.Linear(4, 4), {}, "no attention to change in Linear. Looked for"),
        (nn.MultiheadAttention(8, 2), {}, "no attention to change in MultiheadAttention"),
        (Separate(), {"position": "value"}, "takes position='sdpa' only"),
        (SelfAttention(8, 2, causal=True), {"granularity": "headwise", "position": "output"}, "has no heads"),
        (SelfAttention(8, 2, causal=True), {"granularity": "shared"}, "unknown granularity 'shared'"),
        (SelfAttention(8, 2, causal=True), {"position": "values"}, "Did you mean 'value'"),
    ],
)
def test_wrong_uses_change_nothing(model, options, text):
    before = repr(model)
    with pytest.raises(UsageError, match=text):
        apply(model, "gated-attention", **options)
    assert repr(model) == before


def test_gating_twice_is_refused():
    model = nn.Sequential(SelfAttention(8, 2, causal=True), Separate())
    apply(model, "gated-attention")
    with pytest.raises(UsageError, match="no attention to change"):
        apply(model, "gated-attention")


def test_gating_behind_another_core():
    model = nn.Sequential(SelfAttention(8, 2, causal=True))
    apply(model, "cosine-attention")
    assert list(apply(model, "gated-attention").changes) == ["0"]
    remove(model, "cosine-attention")
    with pytest.raises(UsageError, match="'0' has a gate in front of its proj already"):
        apply(model, "gated-attention")
    assert list(remove(model, "gated-attention").changes) == ["0.proj"]


def test_a_forward_that_broke_off_leaves_a_model_that_can_be_copied():
    model = Separate()
    apply(model, "gated-attention")
    model.q_proj(torch.ones(1, 3, 6, requires_grad=True) * 2)
    assert copy.deepcopy(model).o_proj.attention_gate.x is None


def test_an_output_projection_without_its_query_is_named():
    model = Separate()
    apply(model, "gated-attention")
    with pytest.raises(UsageError, match="ran before the query projection"):
        model.o_proj(torch.zeros(1, 8))
