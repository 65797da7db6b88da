"""Gated linear attention: chunks against a plain loop in NumPy, gates near zero, decoding, and the swap into models."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from trimtab.errors import UsageError
from trimtab.layers import GatedLinearAttention, gated_linear_attention, recurrent_gated_linear_attention
from trimtab.layers._self_attention import SelfAttention
from trimtab.remedy import apply, remove
from trimtab.testing import LayerTestCase


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


def _inputs(length, keys=6, values=5, batch=2, heads=2, seed=0, gate=1.0, dtype=torch.float32):
    """Return q, k, v, log_alpha and a state; `gate` scales the gates' logits before the sigmoid."""
    g = _generator(seed)
    q, k = (torch.randn(batch, heads, length, keys, generator=g, dtype=dtype) for _ in range(2))
    v = torch.randn(batch, heads, length, values, generator=g, dtype=dtype)
    log_alpha = F.logsigmoid(gate * torch.randn(batch, heads, length, keys, generator=g, dtype=dtype)) / 4
    return q, k, v, log_alpha, torch.randn(batch, heads, keys, values, generator=g, dtype=dtype)


def _loop(q, k, v, log_alpha, state):
    """Return the output and the last state, from the recurrence, in float64, head by head and step by step."""
    q, k, v, state = (x.double().numpy() for x in (q, k, v, state))
    alpha = np.exp(log_alpha.double().numpy())
    output, last = np.zeros(v.shape), np.zeros(state.shape)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            s = state[b, h].copy()
            for t in range(q.shape[2]):
                s = np.diag(alpha[b, h, t]) @ s + np.outer(k[b, h, t], v[b, h, t])
                output[b, h, t] = s.T @ q[b, h, t]
            last[b, h] = s
    return torch.from_numpy(output), torch.from_numpy(last)


def _assert_equal(found, expected, bound=1e-5):
    for x, y in zip(found, expected, strict=True):
        assert (x.double() - y).abs().max() <= bound * max(1.0, float(y.abs().max()))


class TestGLA(LayerTestCase):
    def layer(self):
        return GatedLinearAttention(8, 2, short_conv=3, gate_rank=3, chunk=4)

    def inputs(self, samples):
        return (torch.randn(samples, 6, 8, generator=_generator()),)


class TestAppliedGLA(LayerTestCase):
    def layer(self):
        model = nn.Sequential(nn.Linear(8, 8), SelfAttention(8, 2, causal=True))
        apply(model, "gla", chunk=4)
        return model

    def inputs(self, samples):
        return (torch.randn(samples, 6, 8, generator=_generator()),)


@given(
    length=st.integers(1, 40),
    chunk=st.integers(1, 45),
    keys=st.integers(1, 5),
    gate=st.sampled_from([0.1, 3.0, 40.0]),
    seed=st.integers(0, 99),
)
def test_both_forms_equal_the_loop(length, chunk, keys, gate, seed):
    q, k, v, log_alpha, state = _inputs(length, keys, seed=seed, gate=gate)
    expected = _loop(q, k, v, log_alpha, state)
    _assert_equal(gated_linear_attention(q, k, v, log_alpha, initial_state=state, chunk=chunk), expected)
    _assert_equal(recurrent_gated_linear_attention(q, k, v, log_alpha, initial_state=state), expected)


@pytest.mark.parametrize("chunk", [1, 5, 16, 64])
def test_gradients_equal_those_of_the_recurrence(chunk):
    inputs = [x.requires_grad_() for x in _inputs(37, gate=3.0)]
    gradients = []
    for function, options in ((gated_linear_attention, {"chunk": chunk}), (recurrent_gated_linear_attention, {})):
        o, state = function(*inputs[:4], initial_state=inputs[4], **options)
        gradients.append(torch.autograd.grad(o.square().mean() + state.square().mean(), inputs))
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_gradcheck_of_the_function():
    inputs = [x.requires_grad_() for x in _inputs(7, 2, 2, batch=1, heads=1, dtype=torch.float64)]

    def call(q, k, v, log_alpha, state):
        return gated_linear_attention(q, k, v, log_alpha, initial_state=state, chunk=4)

    assert torch.autograd.gradcheck(call, inputs)


@pytest.mark.parametrize("dropped", [-50.0, -1e4, float("-inf")])
def test_gates_near_zero_stay_finite_and_exact(dropped):
    q, k, v, log_alpha, state = _inputs(100)
    closed = torch.rand(log_alpha.shape, generator=_generator(1)) < 0.2
    log_alpha = torch.where(closed, torch.tensor(dropped), log_alpha)
    inputs = [x.requires_grad_() for x in (q, k, v, log_alpha, state)]
    found = gated_linear_attention(*inputs[:4], initial_state=inputs[4])
    _assert_equal([x.detach() for x in found], _loop(*(x.detach() for x in inputs)))
    assert all(x.isfinite().all() for x in torch.autograd.grad(found[0].sum(), inputs))


def test_without_gates_it_is_linear_attention():
    q, k, v, log_alpha, _ = _inputs(50)
    o, state = gated_linear_attention(q, k, v, torch.zeros_like(log_alpha), chunk=16)
    torch.testing.assert_close(o, (q @ k.transpose(-1, -2)).tril() @ v, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(state, k.transpose(-1, -2) @ v, rtol=1e-4, atol=1e-4)


def test_low_precision_is_computed_in_float32():
    q, k, v, log_alpha, _ = _inputs(40)
    exact, _ = gated_linear_attention(q, k, v, log_alpha)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(gated_linear_attention(q, k, v, log_alpha)[0], exact)
    low, state = gated_linear_attention(*(x.bfloat16() for x in (q, k, v, log_alpha)))
    assert (low.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    assert (low.float() - exact).abs().max() <= 0.05 * exact.abs().max()


@pytest.mark.parametrize("function", [gated_linear_attention, recurrent_gated_linear_attention])
def test_no_places(function):
    q, k, v, log_alpha, state = _inputs(0)
    o, last = function(q, k, v, log_alpha, initial_state=state)
    assert o.shape == v.shape
    assert torch.equal(last, state)


@pytest.mark.parametrize("short_conv", [0, 4])
def test_steps_continue_the_sequence(short_conv):
    layer = GatedLinearAttention(8, 2, short_conv=short_conv, chunk=4)
    x = torch.randn(2, 11, 8, generator=_generator())
    outputs, state = [], None
    for part in x.split([5, 1, 1, 4], dim=1):
        y, state = layer.advance(part, state)
        outputs.append(y)
    torch.testing.assert_close(torch.cat(outputs, 1), layer(x), rtol=1e-4, atol=1e-6)


def test_layer_equals_its_equation():
    """Straight from the paper's equations, in float64: low-rank gates with tau, scaled queries, norm and swish gate."""
    layer = GatedLinearAttention(8, 2, expand_k=1.0, tau=4.0).double()
    x = torch.randn(1, 6, 8, generator=_generator(), dtype=torch.float64)
    q, k, v, r = (x @ p.weight.T for p in (layer.q_proj, layer.k_proj, layer.v_proj, layer.output_gate))
    down, up = layer.gate
    alpha = torch.sigmoid(x @ down.weight.T @ up.weight.T + up.bias) ** (1 / 4.0)
    heads = []
    for h in (slice(0, 4), slice(4, 8)):
        s, rows = torch.zeros(4, 4, dtype=torch.float64), []
        for t in range(6):
            s = alpha[0, t, h, None] * s + torch.outer(k[0, t, h], v[0, t, h])
            o = s.T @ q[0, t, h] / 2
            rows.append(o / (o.square().mean() + 1e-5).sqrt())
        heads.append(torch.stack(rows))
    expected = (torch.cat(heads, 1) * r[0] * torch.sigmoid(r[0])) @ layer.o_proj.weight.T
    torch.testing.assert_close(layer(x)[0], expected, rtol=1e-9, atol=1e-12)


def test_it_is_causal():
    layer, x = GatedLinearAttention(8, 2, short_conv=4, chunk=4), torch.randn(1, 9, 8, generator=_generator())
    other = x.clone()
    other[:, 5:] += 1
    assert torch.equal(layer(x)[:, :5], layer(other)[:, :5])


def test_cost_grows_linearly():
    """Counted, not timed: operations of matrix products for 8 times the length are 8 times as many."""
    from torch.utils.flop_counter import FlopCounterMode

    counts = []
    for length in (256, 2048):
        q, k, v, log_alpha, _ = _inputs(length, 8, 8, batch=1, heads=1)
        with FlopCounterMode(display=False) as counter:
            gated_linear_attention(q, k, v, log_alpha)
        counts.append(counter.get_total_flops())
    assert counts[1] == 8 * counts[0]


def test_apply_and_remove():
    model = nn.Sequential(SelfAttention(8, 2, causal=True), nn.Linear(8, 8))
    x, before = torch.randn(2, 5, 8, generator=_generator()), copy.deepcopy(model.state_dict())
    plain = model(x)
    assert list(apply(model, "gla").changes) == ["0"]
    assert not torch.equal(model(x), plain)
    with pytest.raises(UsageError, match="'0' is a _ConvertedGLA already"):
        apply(model, "gla")
    assert list(remove(model, "gla").changes) == ["0"]
    assert torch.equal(model(x), plain)
    assert model.state_dict().keys() == before.keys()


def test_what_cannot_be_changed_is_left_alone():
    model = nn.Sequential(SelfAttention(8, 2, causal=False))
    with pytest.raises(UsageError, match="no causal attention to change in Sequential"):
        apply(model, "gla")
    model = nn.Sequential(SelfAttention(8, 2, causal=True))
    with pytest.raises(UsageError, match="tau must be above 0"):
        apply(model, "gla", tau=0.0)
    assert type(model[0]) is SelfAttention


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"heads": 3}, "expand_k must give a width that 3 heads share evenly, got 0.5 of 8 = 4"),
        ({"heads": 0}, "width and heads must be at least 1"),
        ({"expand_v": 0.0}, "expand_v must give"),
        ({"gate_rank": 0}, "gate_rank must be at least 1"),
        ({"tau": -1.0}, "tau must be above 0"),
        ({"chunk": 0}, "chunk must be at least 1"),
        ({"short_conv": -1}, "covers at least 1 position"),
        ({"eps": 0.0}, "eps must be above 0"),
    ],
)
def test_wrong_options(options, text):
    with pytest.raises(UsageError, match=text):
        GatedLinearAttention(8, **{"heads": 2, **options})


def test_wrong_shapes():
    q, k, v, log_alpha, state = _inputs(5)
    for call, text in (
        (lambda: gated_linear_attention(q, k[..., :3], v, log_alpha), "q and k must share"),
        (lambda: gated_linear_attention(q, k, v[:, :, :3], log_alpha), "v must be"),
        (lambda: gated_linear_attention(q, k, v, log_alpha[..., 0]), "log_alpha must have shape"),
        (lambda: gated_linear_attention(q, k, v, log_alpha, initial_state=state[0]), "initial_state must have"),
        (lambda: gated_linear_attention(q, k, v, log_alpha, chunk=0), "chunk must be at least 1"),
        (lambda: recurrent_gated_linear_attention(q, k, v[0], log_alpha), "v must be"),
    ):
        with pytest.raises(UsageError, match=text):
            call()
