"""Sparse-GIN against loops in NumPy, and that a pretrained model is itself until the scale leaves 0."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from trimtab.errors import UsageError
from trimtab.layers import SparseGIN, sparse_adjacency
from trimtab.layers._self_attention import SelfAttention
from trimtab.remedy import apply, remove
from trimtab.testing import LayerTestCase


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


def _attention(length=7, heads=2, batch=2, dtype=torch.float64):
    logits = 3 * torch.randn(batch, heads, length, length, generator=_generator(), dtype=dtype)
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    return logits.masked_fill(future, -math.inf).softmax(-1)


def _edges(attention, threshold=0.1, sharpness=10.0, cutoff=0.6, self_edges=True):
    """Return the graph, edge by edge, as the authors' `construct_adjacency` has it (sum over heads, one graph)."""
    a = attention.double().numpy()
    batch, _, length, _ = a.shape
    edges = np.zeros((batch, length, length))
    for b in range(batch):
        for i in range(length):
            for j in range(i + 1):
                weight = 1 / (1 + math.exp(-sharpness * (min(a[b, :, i, j].sum(), 1.0) - threshold)))
                if weight > cutoff and (self_edges or i != j):
                    edges[b, i, j] = weight
    return torch.from_numpy(edges)


class TestAppliedSparseGIN(LayerTestCase):
    def layer(self):
        model = nn.Sequential(nn.Linear(8, 8), SelfAttention(8, 2, causal=True))
        # All edges kept, so that low precision does not change which; a scale above 0, so that all has a gradient.
        apply(model, "sparse-gin", hidden=3, scale=0.5, dropout=0.0, threshold=0.0, cutoff=0.0)
        return model

    def inputs(self, samples):
        return (torch.randn(samples, 5, 8, generator=_generator()),)


@pytest.mark.parametrize(
    "options", [{}, {"self_edges": False}, {"threshold": 0.3, "cutoff": 0.4}, {"sharpness": 2.0, "cutoff": 0.0}]
)
def test_adjacency_equals_the_loop(options):
    attention = _attention()
    found, expected = sparse_adjacency(attention, **options), _edges(attention, **options)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    if not options:
        kept = (found > 0).sum() / (2 * 28)
        assert 0.2 < kept < 0.95  # of the edges that causality allows, some are dropped, some not


def test_an_edge_needs_a_summed_weight_of_0_14():
    """sigmoid(10 (a - 0.1)) = 0.6 at a = 0.1 + log(1.5) / 10 = 0.1405."""
    for weight, kept in ((0.140, False), (0.141, True)):
        assert bool(sparse_adjacency(torch.full((1, 1, 1, 1), weight)) > 0) is kept
        assert bool(sparse_adjacency(torch.full((1, 4, 1, 1), weight / 4)) > 0) is kept


def test_update_equals_the_loop():
    torch.manual_seed(0)
    gin = SparseGIN(6, hidden=3, scale=0.75).double().eval()
    with torch.no_grad():
        gin.eps.fill_(0.3)
        gin.norm.weight.uniform_(0.5, 2)
    x, attention = torch.randn(2, 7, 6, generator=_generator(), dtype=torch.float64), _attention()
    weight = {name: p.detach().numpy() for name, p in gin.named_parameters()}

    def linear(name, row):
        return weight[f"{name}.weight"] @ row + weight[f"{name}.bias"]

    def prelu(row):
        return np.where(row > 0, row, weight["activation.weight"] * row)

    edges, expected = _edges(attention).numpy(), np.zeros((2, 7, 6))
    for b in range(2):
        h = [linear("into", row) for row in x[b].numpy()]
        for i in range(7):
            m = 1.3 * h[i] + sum(edges[b, i, j] * h[j] for j in range(7))
            m = m + linear("outer", prelu(linear("inner", m)))
            y = linear("out_of", prelu(m))
            expected[b, i] = 0.75 * weight["norm.weight"] * y / np.sqrt((y**2).mean() + 1e-5)
    torch.testing.assert_close(gin(x, attention), torch.from_numpy(expected), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("causal", [False, True])
def test_the_output_is_unchanged_at_first(causal):
    model = nn.Sequential(SelfAttention(40, 4, causal=causal), nn.Linear(40, 40))
    x = torch.randn(2, 9, 40, generator=_generator())
    plain = model(x)
    assert list(apply(model, "sparse-gin").changes) == ["0"]
    assert torch.equal(model(x), plain)
    with torch.no_grad():
        model[0].gin.scale.fill_(1.0)
    assert not torch.allclose(model(x), plain, atol=1e-3)
    assert list(remove(model, "sparse-gin").changes) == ["0"]
    assert torch.equal(model(x), plain)
    assert type(model[0]) is SelfAttention
    assert not hasattr(model[0], "gin")


def test_projections_run_once_a_forward():
    model = nn.Sequential(SelfAttention(8, 2, causal=True))
    apply(model, "sparse-gin")
    seen = []
    for name in ("qkv", "proj"):
        model[0].get_submodule(name).register_forward_hook(lambda *_, name=name: seen.append(name))
    model(torch.ones(1, 3, 8))
    assert seen == ["qkv", "proj"]


def test_training_leaves_the_start():
    """At a scale of 0 only the scale has a gradient; after one step everything has."""
    model = nn.Sequential(SelfAttention(40, 4, causal=True)).requires_grad_(False)
    apply(model, "sparse-gin")
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == len(list(model[0].gin.parameters()))
    optimizer = torch.optim.Adam(trained, lr=0.1)
    x = torch.randn(2, 9, 40, generator=_generator())
    for step in range(2):
        optimizer.zero_grad()
        (model(x) - 1).square().mean().backward()
        moved = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
        assert "0.gin.scale" in moved
        assert len(moved) == (1 if step == 0 else len(trained))
        optimizer.step()


def test_a_causal_attention_has_a_causal_graph():
    model = nn.Sequential(SelfAttention(8, 2, causal=True))
    apply(model, "sparse-gin", hidden=3, scale=1.0, threshold=-1.0, dropout=0.0)
    x = torch.randn(1, 9, 8, generator=_generator())
    other = x.clone()
    other[:, 5:] += 1
    torch.testing.assert_close(model(x)[:, :5], model(other)[:, :5], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(model(x)[:, 5:], model(other)[:, 5:], atol=1e-3)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"hidden": 0}, "width and hidden must be at least 1"),
        ({"sharpness": 0.0}, "sharpness must be above 0"),
        ({"cutoff": 1.0}, "cutoff must be at least 0 and below 1"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1"),
        ({"norm_eps": 0.0}, "norm_eps must be above 0"),
    ],
)
def test_wrong_options(options, text):
    model = nn.Sequential(SelfAttention(8, 2, causal=True))
    with pytest.raises(UsageError, match=text):
        apply(model, "sparse-gin", **options)
    assert type(model[0]) is SelfAttention


def test_wrong_places():
    with pytest.raises(UsageError, match="no attention to change in Linear"):
        apply(nn.Linear(3, 3), "sparse-gin")
    with pytest.raises(UsageError, match=r"attention must have shape \[B, H, L, L\]"):
        sparse_adjacency(torch.ones(2, 3, 3))
