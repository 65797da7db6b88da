"""Structured feed-forward layers against their dense matrices in plain NumPy, and self-guided training."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from trimtab.errors import UsageError
from trimtab.layers import (
    BlockDenseLinear,
    BlockShuffleLinear,
    LowRankLinear,
    finish_guidance,
    set_guided_step,
)
from trimtab.remedy import apply, remove
from trimtab.testing import LayerTestCase
from trimtab.workloads.lm import LanguageModel

KINDS = ["low-rank", "block-shuffle", "block-dense"]


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


def _layer(kind, in_features=12, out_features=8, **options):
    torch.manual_seed(0)
    if kind == "low-rank":
        return LowRankLinear(in_features, out_features, 3, **options)
    if kind == "block-shuffle":
        return BlockShuffleLinear(in_features, out_features, 2, **options)
    return BlockDenseLinear(in_features, out_features, 4, 2, **options)


def _numpy_matrix(kind, layer):
    """Write out the dense matrix entry by entry."""
    u, v = layer.u.detach().double().numpy(), layer.v.detach().double().numpy()
    if kind == "low-rank":
        return u @ v
    blocks, q, p = v.shape
    first = np.zeros((blocks * q, blocks * p))
    for k in range(blocks):
        first[k * q : (k + 1) * q, k * p : (k + 1) * p] = v[k]
    if kind == "block-dense":
        return u @ first
    blocks, s, r = u.shape
    second = np.zeros((blocks * s, blocks * r))
    for block in range(blocks):
        second[block * s : (block + 1) * s, block * r : (block + 1) * r] = u[block]
    # The inner values are dealt out to the blocks in turn, and the blocks' outputs are taken in turn.
    deal = np.zeros((blocks * r, blocks * q))
    for i in range(blocks * r):
        deal[i % blocks * r + i // blocks, i] = 1
    take = np.zeros((blocks * s, blocks * s))
    for i in range(blocks * s):
        take[i, i % blocks * s + i // blocks] = 1
    return take @ second @ deal @ first


class _Case(LayerTestCase):
    guided_steps = 0

    def layer(self):
        layer = _layer(self.kind, guided_steps=self.guided_steps)
        if self.guided_steps:
            set_guided_step(layer, 3)
        return layer

    def inputs(self, samples):
        return (torch.randn(samples, 3, 12, generator=_generator()),)


class TestLowRank(_Case):
    kind = "low-rank"


class TestBlockShuffle(_Case):
    kind = "block-shuffle"


class TestBlockDense(_Case):
    kind = "block-dense"


class TestGuided(_Case):
    kind = "low-rank"
    guided_steps = 8


class TestApplied(LayerTestCase):
    def layer(self):
        model = nn.Sequential(*(nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True) for _ in range(2)))
        apply(model, "structured-ffn", guided_steps=8)
        set_guided_step(model, 3)
        return model

    def inputs(self, samples):
        return (torch.randn(samples, 5, 8, generator=_generator()),)


@pytest.mark.parametrize(("in_features", "out_features"), [(12, 8), (8, 12), (6, 6)])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_its_expanded_matrix(kind, in_features, out_features):
    layer = _layer(kind, in_features, out_features, dtype=torch.float64)
    nn.init.normal_(layer.bias)
    x = torch.randn(5, in_features, generator=_generator(), dtype=torch.float64)
    matrix = _numpy_matrix(kind, layer)
    expected = x.numpy() @ matrix.T + layer.bias.detach().numpy()
    np.testing.assert_allclose(layer(x).detach().numpy(), expected, rtol=0, atol=1e-12)
    np.testing.assert_allclose(layer.weight.detach().numpy(), matrix, rtol=0, atol=1e-12)


def _blocks(kind, matrix, layer):
    """Return the submatrices whose ranks the structure bounds, and those ranks."""
    if kind == "low-rank":
        return [(matrix, layer.v.shape[0])]
    blocks, q, p = layer.v.shape
    columns = [matrix[:, k * p : (k + 1) * p] for k in range(blocks)]
    if kind == "block-dense":
        return [(part, q) for part in columns]
    found = []
    for k in range(blocks):
        for target in range(blocks):
            links = sum((k * q + i) % blocks == target for i in range(q))
            found.append((columns[k][target::blocks], links))
    return found


@pytest.mark.parametrize(("in_features", "out_features"), [(12, 8), (8, 12), (6, 6)])
@pytest.mark.parametrize("kind", KINDS)
def test_projection_error_is_that_of_the_singular_values(kind, in_features, out_features):
    """Eckart-Young for each submatrix: no matrix of the structure is nearer."""
    layer = _layer(kind, in_features, out_features, dtype=torch.float64)
    weight = torch.randn(out_features, in_features, generator=_generator(1), dtype=torch.float64)
    layer.project_(weight)
    error = ((layer.weight - weight) ** 2).sum()
    bound = sum((np.linalg.svd(part.numpy())[1][rank:] ** 2).sum() for part, rank in _blocks(kind, weight, layer))
    assert bound > 0.1
    np.testing.assert_allclose(error.detach().numpy(), bound, rtol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_projection_recovers_a_matrix_of_the_structure(kind):
    source, layer = _layer(kind, dtype=torch.float64), _layer(kind, dtype=torch.float64)
    for factor in (source.u, source.v):
        nn.init.normal_(factor)
    layer.project_(source.weight)
    torch.testing.assert_close(layer.weight, source.weight, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS[1:])
def test_blocks_start_orthonormal(kind):
    layer = _layer(kind, dtype=torch.float64)
    for matrix in (*layer.v, *(layer.u if layer.u.dim() == 3 else [layer.u])):
        torch.testing.assert_close(torch.linalg.svdvals(matrix), torch.ones(min(matrix.shape), dtype=torch.float64))


@pytest.mark.parametrize("kind", KINDS)
def test_guidance_is_the_papers_mixture(kind):
    steps = 6
    layer = _layer(kind, guided_steps=steps, dtype=torch.float64)
    x = torch.randn(5, 12, generator=_generator(), dtype=torch.float64)
    matrix = torch.from_numpy(_numpy_matrix(kind, layer))
    torch.testing.assert_close(layer.guide.detach(), matrix, rtol=0, atol=1e-12)
    with torch.no_grad():
        layer.guide.add_(1.0)
    for step in range(steps + 2):
        alpha = 0.5 * (1 + math.cos(math.pi * min(step / steps, 1)))
        expected = alpha * x @ (matrix + 1).T + (1 - alpha) * x @ matrix.T
        # float32 holds alpha.
        torch.testing.assert_close(layer.eval()(x), expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(x @ layer.weight.T, expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(layer.train()(x), expected, rtol=0, atol=1e-5)
    assert layer.guide_step == steps + 2


def test_both_branches_start_alike_and_only_the_leading_one_learns():
    layer = _layer("low-rank", guided_steps=4)
    layer(torch.randn(5, 12, generator=_generator())).square().sum().backward()
    assert layer.guide.grad.any()
    assert not layer.u.grad.any()
    assert not layer.v.grad.any()


def test_the_step_moves_with_training_forwards_only_or_by_hand():
    layer = _layer("low-rank", guided_steps=4)
    x = torch.randn(5, 12, generator=_generator())
    layer.eval()(x)
    assert layer.guide_step == 0
    layer.train()(x)
    assert layer.guide_step == 1
    layer = _layer("low-rank", guided_steps=4, count_forwards=False)
    for _ in range(3):
        layer(x)
    assert layer.guide_step == 0
    assert set_guided_step(layer, 2) == pytest.approx(0.5)


@pytest.mark.parametrize("kind", KINDS)
def test_finishing_leaves_no_dense_parameter(kind):
    model = nn.Sequential(_layer(kind, guided_steps=2), nn.ReLU(), _layer(kind, 8, 12, guided_steps=2))
    plain = nn.Sequential(_layer(kind), nn.ReLU(), _layer(kind, 8, 12))
    x = torch.randn(5, 12, generator=_generator())
    with pytest.raises(UsageError, match=r"0 still has alpha = 1: train it to step 2"):
        finish_guidance(model)
    for _ in range(2):
        model(x).square().sum().backward()
    expected = model.eval()(x)
    assert list(finish_guidance(model)) == ["0", "2"]
    assert torch.equal(model(x), expected)
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert [p.shape for p in model.parameters()] == [p.shape for p in plain.parameters()]
    with pytest.raises(UsageError, match="there is nothing to finish"):
        finish_guidance(model)
    with pytest.raises(UsageError, match="has a dense branch"):
        set_guided_step(model, 1)


def test_resumes_in_the_middle_of_the_schedule():
    x = torch.randn(5, 12, generator=_generator())
    layer = _layer("block-dense", guided_steps=5)
    for _ in range(3):
        layer(x)
    other = _layer("block-dense", guided_steps=5)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))
    assert other.guide_step == 4


class Mlp(nn.Module):
    """Two linear layers under given names, as timm and transformers have them."""

    def __init__(self, first, second):
        super().__init__()
        self.names = first, second
        setattr(self, first, nn.Linear(8, 24))
        setattr(self, second, nn.Linear(24, 8, bias=False))

    def forward(self, x):
        return getattr(self, self.names[1])(torch.tanh(getattr(self, self.names[0])(x)))


@pytest.mark.parametrize("names", [("fc1", "fc2"), ("c_fc", "c_proj"), ("linear1", "linear2"), ("lin1", "lin2")])
def test_apply_replaces_the_layers_of_an_mlp(names):
    torch.manual_seed(0)
    model = nn.Sequential(Mlp(*names), Mlp(*names), nn.Linear(8, 3))
    dense = copy.deepcopy(model[1])
    changes = apply(model, "structured-ffn").changes
    assert list(changes) == [f"1.{name}" for name in names]
    assert changes[f"1.{names[0]}"] == "low-rank, projected, 67% of the weights"
    for name in names:
        layer, weight = getattr(model[1], name), getattr(dense, name).weight.detach()
        u, s, vh = torch.linalg.svd(weight)
        torch.testing.assert_close(layer.weight, u[:, :4] * s[:4] @ vh[:4])
        assert (layer.bias is None) == (getattr(dense, name).bias is None)
    assert isinstance(getattr(model[0], names[0]), nn.Linear)


@pytest.mark.parametrize("kind", KINDS)
def test_apply_and_remove_in_the_language_model(kind):
    torch.manual_seed(0)
    model = LanguageModel(32, 16, layers=3)
    changes = apply(model, "structured-ffn", kind=kind, guided_steps=4, init="projected").changes
    assert list(changes) == [f"blocks.{i}.mlp.{j}" for i in (1, 2) for j in (0, 2)]
    assert changes["blocks.1.mlp.0"].endswith("guided for 4 steps")
    tokens = torch.randint(256, (2, 16), generator=_generator())
    for _ in range(2):
        model(tokens).square().mean().backward()
    expected = model.eval()(tokens)
    assert list(remove(model, "structured-ffn").changes) == list(changes)
    torch.testing.assert_close(model(tokens), expected)
    assert {type(model.blocks[1].mlp[j]) for j in (0, 2)} == {nn.Linear}


def test_frozen_and_zero_weights():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)).requires_grad_(False)
    model[2].requires_grad_(True)
    nn.init.zeros_(model[2].weight)
    apply(model, "structured-ffn", keep_first=False, guided_steps=5)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {"2.u", "2.v", "2.guide", "2.bias"}
    model.eval()
    set_guided_step(model, 5)
    (model(torch.randn(32, 8)) - torch.arange(8.0)).square().sum().backward()
    assert model[2].u.grad.any()
    remove(model, "structured-ffn")
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {"2.weight", "2.bias"}


def test_apply_draws_no_random_numbers_where_it_projects():
    model = LanguageModel(32, 16, layers=2)
    state = torch.get_rng_state()
    apply(model, "structured-ffn", kind="block-dense", init="projected", rank=8)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_fused_path_of_torch_reads_the_same_weights():
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)
    apply(model, "structured-ffn", keep_first=False, guided_steps=4)
    set_guided_step(model, 2)
    with torch.no_grad():
        model.linear1.guide.add_(0.1)
    x = torch.randn(3, 5, 8, generator=_generator())
    expected = model.eval()(x)
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected)


def test_a_gated_mlp_is_recognised_whole():
    model = nn.Module()
    model.mlp = nn.Module()
    for name, sizes in {"gate_proj": (8, 24), "up_proj": (8, 24), "down_proj": (24, 8)}.items():
        setattr(model.mlp, name, nn.Linear(*sizes))
    changes = apply(model, "structured-ffn", keep_first=False).changes
    assert sorted(changes) == ["mlp.down_proj", "mlp.gate_proj", "mlp.up_proj"]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"kind": "butterfly"}, "unknown kind of structured layer 'butterfly'"),
        ({"init": "zero"}, "unknown init 'zero'"),
        ({"init": "orthonormal"}, "low-rank layers start projected"),
        ({"rank": 99}, "rank must be 1 to 32, the smaller width, got 99"),
        ({"kind": "block-shuffle", "blocks": 5}, "blocks must divide both widths, got 5 for 32 and 128"),
        ({"kind": "block-dense", "blocks": 3}, "blocks must divide in_features and rank"),
        ({"kind": "block-dense", "rank": 80}, "rank must be 2 to 32"),
        ({"guided_steps": -1}, "guided_steps must be at least 0, got -1"),
    ],
)
def test_wrong_options_change_nothing(options, text):
    model = LanguageModel(32, 16, layers=2)
    before = repr(model)
    with pytest.raises(UsageError, match=text):
        apply(model, "structured-ffn", **options)
    assert repr(model) == before


@pytest.mark.parametrize(
    ("model", "text"),
    [
        (nn.Linear(4, 4), "found none. Looked for nn.Linear, activation"),
        (nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), "found none"),
        (nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)), "only the first one, which keep_first keeps"),
    ],
)
def test_a_model_without_a_feed_forward_block_is_named(model, text):
    with pytest.raises(UsageError, match=text):
        apply(model, "structured-ffn")


def test_wrong_steps_are_refused():
    with pytest.raises(UsageError, match="the step must be at least 0, got -1"):
        set_guided_step(_layer("low-rank", guided_steps=2), -1)
    with pytest.raises(UsageError, match="widths must be at least 1, got 0 and 4"):
        LowRankLinear(0, 4, 1)
