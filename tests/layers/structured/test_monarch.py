"""Monarch matrices against their definition in NumPy, the authors' formula and the singular values of their blocks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from trimtab.errors import UsageError
from trimtab.layers import MonarchLinear
from trimtab.remedy import apply, remove
from trimtab.testing import LayerTestCase
from trimtab.workloads.lm import LanguageModel


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


def _layer(in_features, out_features, blocks, **options):
    torch.manual_seed(0)
    return MonarchLinear(in_features, out_features, blocks, dtype=torch.float64, **options)


class TestSquare(LayerTestCase):
    def layer(self):
        return MonarchLinear(16, 16, 4)

    def inputs(self, samples):
        return (torch.randn(samples, 3, 16, generator=_generator()),)


class TestPadded(LayerTestCase):
    def layer(self):
        return MonarchLinear(7, 10, 3)

    def inputs(self, samples):
        return (torch.randn(samples, 7, generator=_generator()),)


class TestApplied(LayerTestCase):
    def layer(self):
        model = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        apply(model, "monarch", blocks=2, min_features=8)
        return model

    def inputs(self, samples):
        return (torch.randn(samples, 5, 8, generator=_generator()),)


def test_is_the_papers_product():
    """M = P L P^T R for n = m^2, with P the matrix that takes index i m + j to j m + i, written out."""
    m = 3
    layer = _layer(m * m, m * m, m, bias=False)
    right, left = layer.r.detach().numpy(), layer.l.detach().numpy()
    blocks = [np.zeros((m * m, m * m)) for _ in range(2)]
    for i in range(m):
        part = slice(i * m, (i + 1) * m)
        blocks[0][part, part], blocks[1][part, part] = right[i], left[i]
    p = np.zeros((m * m, m * m))
    for i in range(m):
        for j in range(m):
            p[i * m + j, j * m + i] = 1
    expected = p @ blocks[1] @ p.T @ blocks[0]
    x = torch.randn(4, m * m, generator=_generator(), dtype=torch.float64)
    np.testing.assert_allclose(layer(x).detach().numpy(), x.numpy() @ expected.T, rtol=0, atol=1e-12)


def _reference(x, first, second, in_features, out_features):
    """The authors' blockdiag_butterfly_multiply, one index at a time, with MonarchLinear's padding."""
    k, q, p = first.shape
    targets, s, r = second.shape
    padded = np.zeros((len(x), k * p))
    padded[:, :in_features] = x
    inner = np.zeros((len(x), k * q))
    for block in range(k):
        for row in range(q):
            inner[:, block * q + row] = padded[:, block * p : (block + 1) * p] @ first[block, row]
    y = np.zeros((len(x), s * targets))
    for target in range(targets):
        for row in range(s):
            for column in range(r):
                y[:, row * targets + target] += second[target, row, column] * inner[:, column * targets + target]
    return y[:, :out_features]


SHAPES = [(16, 16, 4), (12, 8, 2), (8, 12, 4), (7, 10, 3), (10, 7, 3), (24, 6, 4), (5, 5, 1)]


@pytest.mark.parametrize(("in_features", "out_features", "blocks"), SHAPES)
def test_equals_the_authors_formula(in_features, out_features, blocks):
    layer = _layer(in_features, out_features, blocks)
    x = torch.randn(4, in_features, generator=_generator(), dtype=torch.float64)
    factors = layer.r.detach().numpy(), layer.l.detach().numpy()
    expected = _reference(x.numpy(), *factors, in_features, out_features) + layer.bias.detach().numpy()
    np.testing.assert_allclose(layer(x).detach().numpy(), expected, rtol=0, atol=1e-12)
    in_block, out_block = -(-in_features // blocks), -(-out_features // blocks)
    inner = min(in_block, out_block)
    assert layer.r.shape == (blocks, inner, in_block)
    assert layer.l.shape == (blocks, out_block, inner)


def _trailing(weight, blocks, inner):
    """Return the sum of the squared singular values that no Monarch matrix can hold."""
    out_features, in_features = weight.shape
    padded = np.zeros((-(-out_features // blocks) * blocks, -(-in_features // blocks) * blocks))
    padded[:out_features, :in_features] = weight
    p, total = padded.shape[1] // blocks, 0.0
    for k in range(blocks):
        for target in range(blocks):
            links = sum((k * inner + i) % blocks == target for i in range(inner))
            singular = np.linalg.svd(padded[target::blocks, k * p : (k + 1) * p])[1]
            total += float((singular[links:] ** 2).sum())
    return total


@given(
    in_features=st.integers(1, 14), out_features=st.integers(1, 14), blocks=st.integers(1, 4), seed=st.integers(0, 9)
)
def test_projection_error_is_that_of_the_singular_values(in_features, out_features, blocks, seed):
    blocks = min(blocks, in_features, out_features)
    layer = _layer(in_features, out_features, blocks)
    weight = torch.randn(out_features, in_features, generator=_generator(seed), dtype=torch.float64)
    layer.project_(weight)
    error = float(((layer.weight.detach() - weight) ** 2).sum())
    assert error == pytest.approx(_trailing(weight.numpy(), blocks, layer.r.shape[1]), rel=1e-9, abs=1e-20)


def test_projection_of_the_paper_is_rank_one_and_beats_every_perturbation():
    layer = _layer(16, 16, 4, bias=False)
    weight = torch.randn(16, 16, generator=_generator(), dtype=torch.float64)
    layer.project_(weight)
    best = ((layer.weight - weight) ** 2).sum().detach()
    singular = torch.linalg.svdvals(weight.view(4, 4, 4, 4).permute(2, 1, 0, 3))
    torch.testing.assert_close(best, (singular[..., 1:] ** 2).sum())
    generator = _generator(1)
    right, left = layer.r.detach().clone(), layer.l.detach().clone()
    for _ in range(50):
        for factor, start in ((layer.r, right), (layer.l, left)):
            factor.data = start + 0.05 * torch.randn(start.shape, generator=generator, dtype=torch.float64)
        assert ((layer.weight - weight) ** 2).sum() > best


@pytest.mark.parametrize(("in_features", "out_features", "blocks"), SHAPES)
def test_projection_recovers_a_monarch_matrix(in_features, out_features, blocks):
    source, layer = (_layer(in_features, out_features, blocks) for _ in range(2))
    for factor in (source.r, source.l):
        nn.init.normal_(factor)
    layer.project_(source.weight)
    torch.testing.assert_close(layer.weight, source.weight, rtol=0, atol=1e-12)


def test_the_discrete_fourier_matrix_is_a_monarch_matrix():
    """Up to the order of its columns, as the paper proves: real and imaginary parts of its transform are recovered."""
    m, n = 4, 16
    angle = 2 * np.pi * np.outer(np.arange(n), np.arange(n)) / n
    order = np.arange(n).reshape(m, m).T.reshape(-1)
    fourier = np.exp(-1j * angle)[:, order]
    blocks = fourier.reshape(m, m, m, m).transpose(2, 1, 0, 3)
    assert np.abs(np.linalg.svd(blocks, compute_uv=False)[..., 1:]).max() < 1e-12


def test_a_quarter_of_the_weights_at_sixteen_blocks():
    layer = MonarchLinear(1024, 1024, 32, bias=False)
    assert layer.factor_count() == 2 * 1024 * 32


def test_apply_and_what_it_says():
    torch.manual_seed(0)
    model = LanguageModel(64, 16, layers=1)
    changes = apply(model, "monarch").changes
    assert list(changes) == ["blocks.0.attention.qkv", "blocks.0.attention.proj", "blocks.0.mlp.0", "blocks.0.mlp.2"]
    assert changes["blocks.0.attention.proj"].startswith("4 blocks, 50% of the weights, relative error 0.")
    assert type(model.head) is nn.Linear  # tied to the embedding


def test_removing_keeps_the_function():
    """Reverse sparsification: training goes on with dense matrices from where the Monarch ones are."""
    torch.manual_seed(0)
    model = LanguageModel(32, 16, layers=1).double()
    apply(model, "monarch", min_features=32, init="uniform")
    tokens = torch.randint(256, (2, 16), generator=_generator())
    expected = model(tokens)
    assert len(remove(model, "monarch").changes) == 4
    torch.testing.assert_close(model(tokens), expected, rtol=0, atol=1e-12)
    assert not any(isinstance(module, MonarchLinear) for module in model.modules())
    with pytest.raises(UsageError, match="nothing to remove"):
        remove(model, "monarch")


def test_factors_of_a_zero_weight_can_learn():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    nn.init.zeros_(model[1].weight)
    changes = apply(model, "monarch", blocks=2, min_features=8).changes
    assert changes["1"].endswith("relative error 0.00")
    assert not model[1].weight.any()
    (model(torch.ones(2, 8)) - torch.arange(8.0)).square().sum().backward()
    assert model[1].l.grad.any()


def test_a_frozen_weight_has_frozen_factors_and_back():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[0].requires_grad_(False)
    apply(model, "monarch", blocks=2, min_features=8)
    assert {name for name, p in model.named_parameters() if not p.requires_grad} == {"0.r", "0.l", "0.bias"}
    remove(model, "monarch")
    assert {name for name, p in model.named_parameters() if not p.requires_grad} == {"0.weight", "0.bias"}


def test_projecting_keeps_biases_and_names_to_skip():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    biases = [model[i].bias for i in range(3)]
    assert list(apply(model, "monarch", blocks=2, min_features=8, skip=("2",)).changes) == ["0", "1"]
    assert all(model[i].bias is biases[i] for i in range(3))
    assert type(model[2]) is nn.Linear


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"blocks": 1}, "blocks must be at least 2 to save anything, got 1"),
        ({"init": "zero"}, "unknown init 'zero'"),
        (
            {"min_features": 99},
            "no layer to change in Sequential. Looked for nn.Linear modules in it, at least 99 wide",
        ),
    ],
)
def test_wrong_options_change_nothing(options, text):
    model = nn.Sequential(nn.Linear(64, 64))
    before = repr(model)
    with pytest.raises(UsageError, match=text):
        apply(model, "monarch", **options)
    assert repr(model) == before


def test_wrong_arguments_are_refused():
    with pytest.raises(UsageError, match="blocks must be 1 to 4, the smaller width, got 5"):
        MonarchLinear(4, 8, 5)
    meta = nn.Sequential(nn.Linear(64, 64, device="meta"))
    with pytest.raises(UsageError, match="'0' is on the meta device: apply it to the whole weight"):
        apply(meta, "monarch")


def test_what_other_methods_put_on_a_linear_layer_is_kept():
    torch.manual_seed(0)
    model = LanguageModel(32, 16, layers=2)
    apply(model, "res-post-norm")
    x = torch.randint(32, (2, 8), generator=_generator())
    changed = apply(model, "monarch", min_features=16).changes
    normed = [name for name, module in model.named_modules() if "res_post_norm" in module._modules]
    assert normed
    assert not set(normed) & set(changed)
    assert set(remove(model, "res-post-norm").changes) == set(normed)
    assert model(x).isfinite().all()
