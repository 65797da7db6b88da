"""The V-cycle's operators: the paper's matrices in float64, functions kept exactly, and the round trip."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from trimtab.errors import UsageError
from trimtab.schedule import Layout, VCycle, coalesce, decoalesce, interpolate, pre_ln_layout
from trimtab.workloads.lm import LanguageModel


def _lm(width=16, layers=4, heads=4, seed=0):
    torch.manual_seed(seed)
    model = LanguageModel(width, 12, layers, heads).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def _tokens():
    return torch.randint(256, (3, 12), generator=torch.Generator().manual_seed(0))


def _load(model, state):
    model.load_state_dict(state)
    return model


def _matrices(n, f, parts):
    """F as the authors write it, [I I] / f in each part, and what is derived from it: (out, in) both ways."""
    m = n // (f * parts)
    averaging = np.kron(np.eye(parts), np.concatenate([np.eye(m)] * f, axis=1) / f)
    adding = averaging.T / averaging.T.sum(1, keepdims=True)
    copying = averaging.T / averaging.T.sum(1, keepdims=True)
    sharing = copying.T / copying.T.sum(1, keepdims=True)
    return averaging, adding, copying, sharing


@pytest.mark.parametrize("f", [2, 4])
def test_equals_the_matrices_of_the_paper(f):
    w = torch.randn(24, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    layout = Layout({"fused": ("out*3", "in"), "bias": ("out",)})
    state = {"fused": w, "bias": w[0]}
    small = coalesce(state, layout, width=f, depth=1)
    out_average, _, out_copy, _ = _matrices(24, f, 3)
    average, in_add, copy, in_share = _matrices(8, f, 1)
    np.testing.assert_allclose(small["fused"], out_average @ w.numpy() @ in_add, atol=1e-14)
    np.testing.assert_allclose(small["bias"], average @ w[0].numpy(), atol=1e-14)
    large = decoalesce(small, layout, width=f, depth=1)
    np.testing.assert_allclose(large["fused"], out_copy @ small["fused"].numpy() @ in_share, atol=1e-14)
    np.testing.assert_allclose(large["bias"], copy @ small["bias"].numpy(), atol=1e-14)


def test_depth_is_the_mean_of_neighbours():
    layout = Layout({"*": (None,)}, blocks="h.")
    state = {f"h.{i}.x": torch.tensor([float(i)]) for i in range(6)} | {"y": torch.tensor([9.0])}
    assert {name: x.tolist() for name, x in coalesce(state, layout, width=1, depth=3).items()} == {
        "h.0.x": [1.0],
        "h.1.x": [4.0],
        "y": [9.0],
    }
    large = decoalesce({"h.0.x": torch.ones(1), "h.1.x": torch.zeros(1)}, layout, width=1, depth=2)
    assert {name: x.tolist() for name, x in large.items()} == {
        "h.0.x": [1.0],
        "h.1.x": [1.0],
        "h.2.x": [0.0],
        "h.3.x": [0.0],
    }


def test_a_wider_model_is_the_same_function():
    small, tokens = _lm(8, 2, 2), _tokens()
    for f in (2, 3):
        wide = _load(_lm(8 * f, 2, 2 * f), decoalesce(small.state_dict(), pre_ln_layout(), width=f, depth=1))
        torch.testing.assert_close(wide(tokens), small(tokens), rtol=0, atol=1e-12)


def test_an_untied_head_needs_no_choice():
    def untied(*shape, seed=0):
        model = _lm(*shape, seed=seed)
        model.head.weight = nn.Parameter(torch.randn_like(model.head.weight))
        return model

    small, tokens = untied(8, 2, 2), _tokens()
    wide = _load(untied(16, 2, 4), decoalesce(small.state_dict(), pre_ln_layout(tied=False), depth=1))
    torch.testing.assert_close(wide(tokens), small(tokens), rtol=0, atol=1e-12)


def test_the_codes_tied_embedding_changes_the_function():
    small, tokens = _lm(8, 2, 2), _tokens()
    wide = _load(_lm(16, 2, 4), decoalesce(small.state_dict(), pre_ln_layout(follow="code"), depth=1))
    torch.testing.assert_close(wide.embedding.weight[:, :8], 0.5 * small.embedding.weight)
    assert (wide(tokens) - small(tokens)).abs().max() > 0.1


def test_a_deeper_model_repeats_each_block():
    small, tokens = _lm(8, 2, 2), _tokens()
    deep = _load(_lm(8, 4, 2), decoalesce(small.state_dict(), pre_ln_layout(), width=1))
    small.blocks = nn.ModuleList([small.blocks[0], small.blocks[0], small.blocks[1], small.blocks[1]])
    torch.testing.assert_close(deep(tokens), small(tokens), rtol=0, atol=1e-12)


@pytest.mark.parametrize("follow", ["exact", "code"])
@pytest.mark.parametrize(("width", "depth"), [(2, 2), (3, 1), (1, 2), (4, 3)])
def test_coalescing_undoes_decoalescing(width, depth, follow):
    state, layout = _lm(8, 2, 2).state_dict(), pre_ln_layout(follow=follow)
    large = decoalesce(state, layout, width=width, depth=depth)
    back = coalesce(large, layout, width=width, depth=depth)
    assert back.keys() == state.keys()
    for name, tensor in state.items():
        torch.testing.assert_close(back[name], tensor, rtol=1e-13, atol=1e-13)
    assert all(large[name].data_ptr() != tensor.data_ptr() for name, tensor in state.items())


def test_a_cycle_interpolates_and_breaks_the_symmetry():
    model = _lm()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    cycle = VCycle(pre_ln_layout(), lambda: _lm(8, 2, 2, seed=5), lambda: _lm(seed=6), alpha=0.25)
    small = cycle.down(model)
    assert (len(small.blocks), small.embedding.embedding_dim) == (2, 8)
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.mul_(1.5)
    resumed = VCycle(pre_ln_layout(), cycle.small, cycle.large, alpha=0.25)
    resumed.load_state_dict(cycle.state_dict())
    mapped = decoalesce(small.state_dict(), pre_ln_layout())
    for large in (cycle.up(small), resumed.up(small)):
        for name, tensor in large.state_dict().items():
            torch.testing.assert_close(tensor, 0.75 * before[name] + 0.25 * mapped[name])
        assert large.head.weight is large.embedding.weight
        up = large.blocks[0].mlp[0].weight
        assert not torch.equal(up[:32], up[32:])
    up = mapped["blocks.0.mlp.0.weight"]
    assert torch.equal(up[:32], up[32:])


def test_buffers_that_are_numbers_are_left_out():
    model = nn.BatchNorm1d(4)
    assert "num_batches_tracked" not in coalesce(model.state_dict(), Layout({"*": ("out",)}), depth=1)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (
            lambda: coalesce(_lm().state_dict(), pre_ln_layout(), width=3),
            "16 neurons in 1 part.* cannot be merged by 3",
        ),
        (lambda: coalesce(_lm().state_dict(), pre_ln_layout(), depth=3), "blocks cannot be merged by 3"),
        (lambda: coalesce({"x": torch.ones(2)}, pre_ln_layout()), "the layout has no pattern for 'x'"),
        (lambda: coalesce({"x": torch.ones(2, 2)}, Layout({"x": ("out",)})), "gives 'x' 1 dimensions, it has 2"),
        (lambda: coalesce({"x": torch.ones(2)}, Layout({"x": ("both",)})), "role 'both' of 'x' is none"),
        (lambda: decoalesce({"x": torch.ones(2)}, Layout({"x": ("in",)}), width=0), "width must be a whole number"),
        (lambda: interpolate({}, {}, alpha=2), r"alpha must be in \[0, 1\], got 2"),
        (lambda: interpolate({"x": torch.ones(2)}, {"x": torch.ones(3)}), "'x' is not in both models with one shape"),
        (lambda: pre_ln_layout(follow="paper"), "unknown follow 'paper'"),
        (
            lambda: VCycle(pre_ln_layout(), lambda: _lm(8, 3, 2), _lm).down(_lm()),
            "the mapped weights lack 'blocks.2",
        ),
    ],
)
def test_wrong_use_is_one_line(call, text):
    with pytest.raises(UsageError, match=text):
        call()
