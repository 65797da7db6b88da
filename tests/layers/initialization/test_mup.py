"""muP against table 8 of the paper, written out by hand: variances, multipliers and rates, and what must survive."""

from __future__ import annotations

import copy
import io
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from trimtab.errors import UsageError
from trimtab.layers import apply_mup, mup_factors, mup_groups, mup_param_groups, mup_shapes
from trimtab.layers._multihead import QKNormMultiheadAttention
from trimtab.remedy import apply
from trimtab.testing import LayerTestCase, run_ranks
from trimtab.workloads.lm import LanguageModel
from trimtab.workloads.transformer import SelfAttention

_BASE, _WIDTH = 8, 32


class _Net(nn.Module):
    """Every role: embedding, convolutions, norms, a hidden layer of another shape, a readout."""

    def __init__(self, width):
        super().__init__()
        self.table = nn.Embedding(5, width)
        self.conv = nn.Conv1d(width, 2 * width, 3, padding=1)
        self.norm = nn.BatchNorm1d(2 * width)
        self.hidden = nn.Linear(2 * width, width)
        self.rms = nn.RMSNorm(width)
        self.gain = nn.Parameter(torch.ones(3))
        self.head = nn.Linear(width, 3)

    def forward(self, tokens):
        x = self.norm(self.conv(self.table(tokens).transpose(1, 2))).relu().transpose(1, 2)
        return self.gain * self.head(self.rms(self.hidden(x)))


def _lm(width):
    return LanguageModel(width, context=6, layers=1, heads=2)


def _meta(build, width=_BASE):
    with torch.device("meta"):
        return build(width)


class TestLanguageModelInMuP(LayerTestCase):
    def layer(self):
        model = _lm(16)
        apply_mup(model, _meta(_lm))
        return model

    def inputs(self, samples):
        return (torch.arange(samples * 6).view(samples, 6) % 256,)


class TestMultiheadInMuP(LayerTestCase):
    def layer(self):
        model = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        apply_mup(model, nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, device="meta"))
        return model

    def inputs(self, samples):
        return (torch.linspace(-1, 1, samples * 3 * 16).sin().view(samples, 3, 16),)


def test_table_8():
    model = _Net(_WIDTH)
    apply_mup(model, _meta(_Net))
    # fan-in / base fan-in is 4 for the convolution and head, and 64 / 16 = 4 for the hidden layer; fan-out likewise.
    expected = {
        "table.weight": ("input", 1, 4),
        "conv.weight": ("hidden", 1 / 4, 1),
        "conv.bias": ("vector", 1, 4),
        "norm.weight": ("vector", 1, 4),
        "norm.bias": ("vector", 1, 4),
        "hidden.weight": ("hidden", 1 / 4, 1),
        "hidden.bias": ("vector", 1, 4),
        "rms.weight": ("vector", 1, 4),
        "gain": ("finite", 1, 1),
        "head.weight": ("output", 1, 4),
        "head.bias": ("finite", 1, 1),
    }
    assert {name: shape.role for name, shape in mup_shapes(model).items()} == {k: v[0] for k, v in expected.items()}
    assert mup_factors(model, "adam") == {name: value[1] for name, value in expected.items()}
    assert mup_factors(model, "sgd") == {name: value[2] for name, value in expected.items()}


def test_unequal_fans():
    """Hidden weights whose sides grow differently: Adam's rate follows the fan-in, SGD's fan-out over fan-in."""

    def build(wide, narrow):
        return nn.Sequential(nn.Linear(3, wide), nn.Linear(wide, narrow), nn.Linear(narrow, 2))

    model = build(40, 12)
    apply_mup(model, build(8, 6))
    assert mup_factors(model, "adam")["1.weight"] == pytest.approx(1 / 5)
    assert mup_factors(model, "sgd")["1.weight"] == pytest.approx(2 / 5)
    turned = nn.Sequential(nn.ConvTranspose1d(40, 12, 3), nn.Linear(1, 1))
    apply_mup(turned, nn.Sequential(nn.ConvTranspose1d(8, 6, 3), nn.Linear(1, 1)))
    assert mup_factors(turned, "adam")["0.weight"] == pytest.approx(1 / 5)


@pytest.mark.parametrize("init", ["torch", "gpt2", "kaiming", "xavier", "unknown"])
def test_initialisation_has_the_variance_of_table_8(init):
    """Hidden: base variance / n~; input, output and biases: the base's; by the law of the initial weights."""

    def build(width):
        model = nn.Sequential(nn.Linear(300, width), nn.Linear(width, width), nn.Linear(width, 400))
        for part in model if init != "torch" else ():
            if init == "gpt2":
                nn.init.normal_(part.weight, std=0.02)
                nn.init.zeros_(part.bias)
            elif init == "kaiming":
                nn.init.kaiming_normal_(part.weight)
            elif init == "xavier":
                nn.init.xavier_uniform_(part.weight)
            else:  # no law of torch's: told by the base's weights
                nn.init.normal_(part.weight, std=0.77 / math.sqrt(part.in_features))
        return model

    base, model = build(128), build(512)
    apply_mup(model, base)
    for name, expected in (("0.weight", 1), ("1.weight", 4), ("2.weight", 1), ("1.bias", 1), ("2.bias", 1)):
        if init == "gpt2" and "bias" in name:
            assert not model.get_parameter(name).any()
            continue
        ratio = base.get_parameter(name).detach().double().var() / model.get_parameter(name).detach().double().var()
        assert float(ratio) == pytest.approx(expected, rel=0.25 if "bias" in name else 0.05), name


def test_base_on_the_meta_device_gives_the_same():
    torch.manual_seed(0)
    one, base = _Net(_WIDTH), _Net(_BASE)
    other = copy.deepcopy(one)
    assert apply_mup(one, base) == apply_mup(other, _meta(_Net))
    for left, right in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(left, right)


def test_at_the_width_of_the_base_nothing_changes():
    model = _lm(_BASE)
    before = copy.deepcopy(model)
    assert apply(model, "mup", base=_meta(_lm)).changes == {"": "as it was: it has the base's width"}
    tokens = torch.arange(6)[None]
    assert torch.equal(model(tokens), before(tokens))
    assert set(mup_factors(model, "sgd").values()) == {1.0}
    [group] = mup_param_groups(model, lr=0.1)
    assert (group["lr"], len(group["params"])) == (0.1, len(list(model.parameters())))


class _Projections(nn.Module):
    def __init__(self, width, names=("q_proj", "k_proj")):
        super().__init__()
        self.num_heads, self.names = 2, names
        for name in (*names, "v"):
            self.add_module(name, nn.Linear(width, width))

    def forward(self, x):
        q, k, v = (getattr(self, name)(x).unflatten(-1, (2, -1)).transpose(1, 2) for name in (*self.names, "v"))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2)


def _normed(width):
    module = SelfAttention(width, 2, causal=False)
    apply(module, "qk-norm")
    return module


@pytest.mark.parametrize(
    ("build", "options"),
    [
        (lambda width: SelfAttention(width, 2, causal=False), {}),
        (_normed, {}),
        (_Projections, {}),
        (lambda width: _Projections(width, ("mine", "yours")), {"queries": {"mine": 2}}),
        (lambda width: nn.MultiheadAttention(width, 2, batch_first=True), {}),
    ],
    ids=["fused", "qk-norm", "projections", "named", "multihead"],
)
def test_attention_logits_scale_with_one_over_d(build, options, monkeypatch):
    """q·k sqrt(d_base) / d = q·k / sqrt(d) * sqrt(d_base / d), read off the call of the attention itself."""
    seen = []
    original = F.scaled_dot_product_attention

    def spy(q, k, *args, **kwargs):
        seen.append(q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1]))
        return original(q, k, *args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    model = build(_WIDTH)
    plain, x = copy.deepcopy(model), torch.randn(2, 3, _WIDTH)
    apply_mup(model, _meta(build), rescale=False, **options)
    given = {"need_weights": False} if isinstance(model, nn.MultiheadAttention) else {}
    for part in (plain, model):
        part(*[x] * 3, **given) if given else part(x)
    if given:  # torch's own function called the attention out of our sight
        assert type(model) is QKNormMultiheadAttention
        rows = plain.in_proj_weight[: 2 * _WIDTH]
        q, k = ((x @ part.T).unflatten(-1, (2, -1)).transpose(1, 2) for part in rows.chunk(2))
        seen.insert(0, q @ k.transpose(-2, -1) / math.sqrt(_WIDTH / 2))
    torch.testing.assert_close(seen[-1], seen[0] * math.sqrt(_BASE / _WIDTH), rtol=1e-5, atol=1e-6)


def test_output_multiplier_and_tied_head():
    model = _lm(_WIDTH)
    weight = model.embedding.weight.detach().clone()
    apply_mup(model, _meta(_lm), output_mult=3.0)
    assert torch.equal(model.embedding.weight, weight)
    assert model.head.weight is model.embedding.weight
    x = torch.randn(2, _WIDTH)
    torch.testing.assert_close(model.head(x), 3.0 * F.linear(x, weight) * _BASE / _WIDTH)
    torch.testing.assert_close(model.head(input=x), model.head(x))
    assert mup_shapes(model)["embedding.weight"].role == "input"


def test_zero_initialisation():
    def build(width):
        return nn.Sequential(nn.Linear(4, width), SelfAttention(width, 2, causal=False), nn.Linear(width, 3))

    model = build(_WIDTH)
    apply_mup(model, _meta(build), readout_zero_init=True, query_zero_init=True)
    assert not model[2].weight.any()
    assert not model[2].bias.any()
    q, k, v = model[1].qkv.weight.chunk(3)
    assert not q.any()
    assert k.all()
    assert v.all()
    multihead = nn.MultiheadAttention(_WIDTH, 2)
    apply_mup(multihead, nn.MultiheadAttention(_BASE, 2), query_zero_init=True)
    assert not multihead.in_proj_weight[:_WIDTH].any()
    assert multihead.in_proj_weight[_WIDTH:].all()
    own = build(_BASE)
    apply_mup(own, _meta(build), readout_zero_init=True, query_zero_init=True, readouts=["2"])
    assert not own[2].weight.any()
    assert not own[1].qkv.weight[:_BASE].any()
    with pytest.raises(UsageError, match=r"shares 'embedding.weight' with an embedding"):
        apply_mup(_lm(_WIDTH), _meta(_lm), readout_zero_init=True)


def _steps(model, optimizer, first, count):
    for step in range(first, first + count):
        tokens = (torch.arange(24).view(4, 6) * (step + 3)) % 256
        optimizer.zero_grad()
        F.cross_entropy(model(tokens).flatten(0, 1), tokens.roll(1, 1).flatten()).backward()
        optimizer.step()


def _made(width=16):
    torch.manual_seed(0)
    model = _lm(width)
    apply_mup(model, _meta(_lm))
    return model, torch.optim.AdamW(mup_param_groups(model, lr=0.01, weight_decay=0.1), lr=0.01)


def test_a_checkpoint_continues_identically():
    model, optimizer = _made()
    _steps(model, optimizer, 0, 3)
    stream = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, stream)
    _steps(model, optimizer, 3, 3)
    stream.seek(0)
    saved = torch.load(stream, weights_only=True)
    other, continued = _made()
    other.load_state_dict(saved["model"])
    continued.load_state_dict(saved["optimizer"])
    _steps(other, continued, 3, 3)
    for left, right in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(left, right)
    assert model.state_dict().keys() == _lm(16).state_dict().keys()


def test_a_copy_and_wrappers_know_their_factors():
    model, _ = _made()
    expected = mup_factors(model)
    assert mup_factors(copy.deepcopy(model)) == expected
    wrapped = nn.Sequential(torch.compile(model, backend="eager"))
    assert list(mup_factors(wrapped).values()) == list(expected.values())
    [[one, other], [lr, hidden]] = zip(*_sizes(mup_param_groups(wrapped, lr=0.1)), strict=True)
    assert (one + other, lr, hidden) == (len(expected), 0.1, pytest.approx(0.05))


def _sizes(groups):
    return [(len(group["params"]), group["lr"]) for group in groups]


def test_sharded_training_is_that_of_one_process():
    def work(rank):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        model, _ = _made()
        mesh = init_device_mesh("cpu", (2,))
        fully_shard(model.blocks[0], mesh=mesh)
        fully_shard(model, mesh=mesh)
        optimizer = torch.optim.AdamW(mup_param_groups(model, lr=0.01, weight_decay=0.1), lr=0.01)
        _steps(model, optimizer, 0, 3)
        return {"factors": mup_factors(model), **{n: p.full_tensor() for n, p in model.state_dict().items()}}

    model, optimizer = _made()
    _steps(model, optimizer, 0, 3)
    for state in run_ranks(work):
        assert state.pop("factors") == mup_factors(model)
        for name, value in model.state_dict().items():
            torch.testing.assert_close(state[name], value, rtol=1e-3, atol=1e-5)


def test_groups_are_split_and_keep_what_they_have():
    model, _ = _made(_WIDTH)
    named = [(name, p) for name, p in model.named_parameters() if "norm" not in name]
    norms = [p for name, p in model.named_parameters() if "norm" in name]
    given = [
        {"params": named, "lr": 0.4, "weight_decay": 0.5, "role": "matrix", "tags": [name for name, _ in named]},
        {"params": norms},
    ]
    first, second, third = mup_groups(model, given, lr=0.2)
    assert (first["lr"], first["weight_decay"], first["role"]) == (0.4, 0.5, "matrix")
    assert (second["lr"], second["weight_decay"], second["role"]) == (pytest.approx(0.1), pytest.approx(2.0), "matrix")
    for group in (first, second):
        assert [name for name, _ in group["params"]] == group["tags"]
    assert first["tags"] == ["embedding.weight", "position.weight"]
    assert (third["lr"], "weight_decay" in third, len(third["params"])) == (0.2, False, len(norms))
    assert given[0]["lr"] == 0.4
    assert [group["lr"] for group in mup_groups(model, model.parameters(), "sgd", lr=0.1)] == [0.4, 0.1]


def test_apply_changes_say_what_they_did():
    changes = apply(_Net(_WIDTH), "mup", base=_meta(_Net)).changes
    assert (
        changes["head"]
        == "weight times 2 (fan_in initialisation); bias times 2 (fan_in initialisation); input times 0.25"
    )
    assert "Adam's rate times 0.25" in changes["hidden"]


class _Hidden(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.mixer = nn.Linear(width, 3 * width)

    def forward(self, x):
        return F.scaled_dot_product_attention(*self.mixer(x).chunk(3, -1))


class _Loose(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.table = nn.Embedding(5, width)

    def forward(self, tokens):
        x = self.table(tokens)
        return F.linear(x, self.table.weight)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: apply_mup(_Net(16), nn.Linear(2, 2)), "the model has no parameter 'bias'|base model has no parameter"),
        (lambda: apply_mup(nn.Linear(4, 4), nn.Bilinear(4, 4, 4)), "has 2 dimensions, in the base model 3"),
        (lambda: apply_mup(nn.Bilinear(4, 4, 4), nn.Bilinear(2, 2, 2)), "3 infinite dimensions, at most two"),
        (lambda: apply_mup(_made()[0], _meta(_lm)), "in muP already"),
        (lambda: apply_mup(_meta(_lm, 16), _meta(_lm)), "no weights yet"),
        (lambda: apply_mup(_lm(16), _meta(_lm), init="normal"), "unknown init 'normal'"),
        (lambda: apply_mup(_lm(16), _meta(_lm), output_mult=0.0), "output_mult must be above 0, got 0.0"),
        (lambda: apply_mup(_lm(8), _meta(_lm), output_mult=2.0), r"name it, as in readouts=\['head'\]"),
        (lambda: apply_mup(_lm(16), _meta(_lm), readouts=["norm"]), "'head' maps from an infinite .* in readouts too"),
        (lambda: apply_mup(_lm(8), _meta(_lm), readouts=["norm"]), "'norm', which is no linear"),
        (lambda: apply_mup(_Hidden(16), _Hidden(8)), "queries of '_Hidden' are not found"),
        (lambda: apply_mup(_Hidden(16), _Hidden(8), queries={"mixer": 5}), "'mixer' with 5 heads"),
        (lambda: apply_mup(_Hidden(16), _Hidden(8), queries={"other": 2}), "'other', which is not a module"),
        (lambda: apply_mup(_Loose(16), _Loose(8)), "hands table.weight to F.linear"),
        (lambda: mup_factors(_lm(16)), "not in muP"),
        (lambda: mup_factors(_made()[0], "adamw"), "unknown kind of optimizer 'adamw'"),
        (lambda: mup_groups(_made()[0], [{"params": []}]), "no learning rate"),
    ],
)
def test_wrong_use_is_one_line(call, text):
    with pytest.raises(UsageError, match=text) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_what_comes_later_is_refused():
    model, _ = _made()
    apply(model, "qk-norm")
    with pytest.raises(
        UsageError, match=r"q_norm.weight was not in the model when it was put into muP: apply muP last"
    ):
        mup_param_groups(model, lr=0.1)


def test_attention_may_be_left_alone():
    model = _Hidden(16)
    assert list(apply_mup(model, _Hidden(8), attention=False)) == ["mixer"]
