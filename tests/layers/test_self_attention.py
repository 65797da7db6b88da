"""The attention that methods convert, against plain loops and timm's, and what converting and reverting keep."""

from __future__ import annotations

import copy
import importlib
import math
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from trimtab.errors import UsageError
from trimtab.layers import GatedAttention
from trimtab.layers._self_attention import ConvertedAttention, SelfAttention, converted, convertible
from trimtab.remedy import apply
from trimtab.testing import LayerTestCase, run_ranks


def _input(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(1))


class Doubled(ConvertedAttention):
    """Attention with a parameter of its own: twice it is added to what the layer was given."""

    parts = ("extra", "option")

    def setup(self, *, option=1.0):
        if option < 0:
            raise UsageError(f"option must be at least 0, got {option}.")
        self.option = option
        self.extra = nn.Parameter(torch.ones(1, dtype=self.qkv.weight.dtype))

    def attend(self, q, k, v, x):
        return self.extra * 2 * super().attend(q, k, v, x)


class TestConverted(LayerTestCase):
    def layer(self):
        model = nn.Sequential(SelfAttention(8, 2, causal=False, bias=True))
        Doubled.convert(model[0])
        return model

    def inputs(self, samples):
        return (_input(samples, 5, 8, dtype=torch.float32),)


def _loops(attention, x):
    """Softmax attention in plain loops, float64."""
    weight = attention.qkv.weight.detach().numpy()
    bias = 0 if attention.qkv.bias is None else attention.qkv.bias.detach().numpy()
    heads, width = attention.num_heads, attention.head_dim
    out = np.zeros((*x.shape[:2], heads * width))
    for b in range(x.shape[0]):
        q, k, v = ((x[b] @ weight.T + bias).reshape(-1, 3, heads, width)[:, part] for part in range(3))
        for h in range(heads):
            for i in range(x.shape[1]):
                seen = i + 1 if attention.causal else x.shape[1]
                weights = np.exp([q[i, h] @ k[j, h] / math.sqrt(width) for j in range(seen)])
                out[b, i, h * width : (h + 1) * width] = weights / weights.sum() @ v[:seen, h]
    return out @ attention.proj.weight.detach().numpy().T


@pytest.mark.parametrize("causal", [False, True])
def test_equals_plain_loops(causal):
    attention = SelfAttention(6, 3, causal=causal).double()
    x = _input(2, 5, 6)
    np.testing.assert_allclose(attention(x).detach().numpy(), _loops(attention, x.numpy()), atol=1e-12)


@pytest.mark.parametrize(("width", "heads"), [(8, 3), (8, 0), (0, 2)])
def test_width_must_be_a_multiple_of_the_heads(width, heads):
    with pytest.raises(UsageError, match=f"must be a multiple of its {heads} heads, got {width}"):
        SelfAttention(width, heads, causal=True)


@pytest.mark.parametrize("causal", [False, True])
def test_convert_and_revert(causal):
    attention = SelfAttention(8, 2, causal=causal).double()
    model = nn.ModuleDict({"a": attention, "b": nn.Linear(8, 8)})
    x = _input(2, 5, 8)
    expected, text, keys, inside = attention(x), repr(model), list(model.state_dict()), set(vars(attention))
    assert list(convertible(model)) == ["a"]
    Doubled.convert(attention)
    assert list(converted(model, Doubled)) == ["a"]
    assert convertible(model) == converted(model, ConvertedAttention) == {}
    assert sorted(model.state_dict()) == sorted([*keys, "a.extra"])
    changed = attention(x)
    torch.testing.assert_close(changed, 2 * expected)
    twin = copy.deepcopy(model)
    assert type(twin["a"]) is Doubled
    attention.revert()
    assert (repr(model), list(model.state_dict()), set(vars(attention))) == (text, keys, inside)
    torch.testing.assert_close(attention(x), expected)
    torch.testing.assert_close(twin["a"](x), changed)
    twin["a"].revert()
    torch.testing.assert_close(twin["a"](x), expected)


def test_wrong_options_change_nothing():
    attention = SelfAttention(8, 2, causal=True)
    inside = set(vars(attention))
    with pytest.raises(UsageError, match="option must be at least 0"):
        Doubled.convert(attention, option=-1.0)
    assert type(attention) is SelfAttention
    assert set(vars(attention)) == inside


def test_one_core_at_a_time():
    attention = SelfAttention(8, 2, causal=True)
    Doubled.convert(attention)
    with pytest.raises(UsageError, match="this attention is a Doubled already: remove that first"):
        GatedAttention.convert(attention)


@pytest.mark.parametrize("training", [False, True])
def test_new_parts_are_in_the_mode_of_the_attention(training):
    attention = SelfAttention(8, 2, causal=True).train(training)
    GatedAttention.convert(attention)
    assert attention.attention_gate.training is training


def _refusals(rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    found = {}
    for method in ("gated-attention", "ls-attention", "gin-attention", "sparse-gin", "gla", "gated-deltanet"):
        model = nn.Sequential(SelfAttention(8, 2, causal=True))
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
        with pytest.raises(UsageError) as caught:
            apply(model, method)
        found[method] = (str(caught.value), type(model[0]) is SelfAttention)
    with pytest.raises(UsageError) as caught:
        Doubled.convert(model[0])
    return {**found, "this SelfAttention": (str(caught.value).replace(" is", ": '0' is", 1), True)}


def test_sharded_attention_is_refused():
    for found in run_ranks(_refusals):
        for method, (text, untouched) in found.items():
            assert text.startswith(f"{method}: '0' is sharded already: ")
            assert untouched


def test_what_was_built_as_one_stays_one():
    built = GatedAttention(8, 2, causal=True)
    assert convertible(built) == converted(built, GatedAttention) == {}
    with pytest.raises(UsageError, match="was built as one: there is nothing to turn it back into"):
        built.revert()


def test_masks_are_refused():
    attention = SelfAttention(8, 2, causal=False)
    Doubled.convert(attention)
    x = _input(1, 3, 8, dtype=torch.float32)
    attention(x, attn_mask=None, is_causal=False)
    with pytest.raises(UsageError, match=r"\(Doubled\) takes no attention mask"):
        attention(x, attn_mask=torch.ones(3, 3))
    with pytest.raises(UsageError, match="takes no is_causal=True"):
        attention(x, is_causal=True)


class OtherCore(SelfAttention):
    def attend(self, q, k, v, x):
        return v


def test_other_cores_are_left_alone():
    assert convertible(nn.ModuleList([OtherCore(8, 2, causal=True), nn.MultiheadAttention(8, 2)])) == {}


@pytest.fixture
def timm_attention():
    """timm's Attention from its own file: the whole package needs torchvision."""
    spec = importlib.util.find_spec("timm")
    if spec is None or spec.origin is None:
        pytest.skip("timm is not installed")
    names = [name for name in sys.modules if name.split(".")[0] == "timm"]
    kept = {name: sys.modules.pop(name) for name in names}
    root = Path(spec.origin).parent
    for name, folder in (("timm", root), ("timm.layers", root / "layers")):
        package = types.ModuleType(name)
        package.__path__ = [str(folder)]
        sys.modules[name] = package
    yield importlib.import_module("timm.layers.attention").Attention
    for name in [name for name in sys.modules if name.split(".")[0] == "timm"]:
        del sys.modules[name]
    sys.modules.update(kept)


def test_equals_timm(timm_attention):
    """timm's own function before, the method's while converted, timm's again after."""
    attention = timm_attention(12, 3, qkv_bias=True, attn_head_dim=2).double()
    x = _input(2, 5, 12)
    expected, keys, inside = attention(x), list(attention.state_dict()), set(vars(attention))
    assert list(convertible(attention)) == [""]
    ConvertedAttention.convert(attention)
    torch.testing.assert_close(attention(x, attn_mask=None, is_causal=False), expected)
    attention.revert()
    assert (type(attention), list(attention.state_dict()), set(vars(attention))) == (timm_attention, keys, inside)
    torch.testing.assert_close(attention(x), expected)
    with pytest.raises(UsageError, match="option must be"):
        Doubled.convert(attention, option=-1.0)
    assert set(vars(attention)) == inside


@pytest.mark.parametrize(
    "options",
    [{"attn_drop": 0.1}, {"proj_drop": 0.1}, {"gated": True}, {"scale_norm": True, "norm_layer": nn.LayerNorm}],
    ids=str,
)
def test_timm_with_other_parts_is_left_alone(timm_attention, options):
    assert convertible(timm_attention(12, 3, **options)) == {}


def test_gate_equals_timm(timm_attention):
    """timm's gated=True is the elementwise gate behind the heads."""
    theirs = timm_attention(12, 3, gated=True).double()
    ours = GatedAttention(12, 3, causal=False).double()
    ours.qkv.load_state_dict(theirs.qkv.state_dict())
    ours.proj = theirs.proj
    ours.attention_gate.weight.data.copy_(theirs.gate.weight)
    x = _input(2, 5, 12)
    torch.testing.assert_close(ours(x), theirs(x))
