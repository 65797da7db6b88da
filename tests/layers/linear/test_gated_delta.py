"""The gated delta rule: chunks against a plain loop in NumPy, its neutral cases, Qwen3-Next's code, and the swap."""

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
from trimtab.layers import GatedDeltaNet, gated_delta_rule, recurrent_gated_delta_rule
from trimtab.layers._self_attention import SelfAttention
from trimtab.remedy import apply, remove
from trimtab.testing import LayerTestCase


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


def _inputs(length, keys=6, values=5, batch=2, heads=2, seed=0, decay=0.5, dtype=torch.float32):
    """Return q, k, v, log_alpha, beta and a state; `decay` is the largest -log_alpha."""
    g = _generator(seed)
    q, k = (F.normalize(torch.randn(batch, heads, length, keys, generator=g, dtype=dtype), dim=-1) for _ in range(2))
    v = torch.randn(batch, heads, length, values, generator=g, dtype=dtype)
    log_alpha = -decay * torch.rand(batch, heads, length, generator=g, dtype=dtype)
    beta = torch.rand(batch, heads, length, generator=g, dtype=dtype)
    return q, k, v, log_alpha, beta, torch.randn(batch, heads, keys, values, generator=g, dtype=dtype)


def _loop(q, k, v, log_alpha, beta, state):
    """Return the output and the last state, from the paper's equation with S [V, K], in float64, step by step."""
    q, k, v, beta, state = (x.double().numpy() for x in (q, k, v, beta, state))
    alpha = np.exp(log_alpha.double().numpy())
    output, last = np.zeros(v.shape), np.zeros(state.shape)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            s = state[b, h].T.copy()
            for t in range(q.shape[2]):
                key, strength = k[b, h, t], beta[b, h, t]
                erase = np.eye(len(key)) - strength * np.outer(key, key)
                s = alpha[b, h, t] * s @ erase + strength * np.outer(v[b, h, t], key)
                output[b, h, t] = s @ q[b, h, t]
            last[b, h] = s.T
    return torch.from_numpy(output), torch.from_numpy(last)


def _assert_equal(found, expected, bound=1e-5):
    for x, y in zip(found, expected, strict=True):
        assert (x.double() - y).abs().max() <= bound * max(1.0, float(y.abs().max()))


class TestGatedDeltaNet(LayerTestCase):
    def layer(self):
        return GatedDeltaNet(8, 2, chunk=4)

    def inputs(self, samples):
        return (torch.randn(samples, 6, 8, generator=_generator()),)


class TestAppliedGatedDeltaNet(LayerTestCase):
    def layer(self):
        model = nn.Sequential(nn.Linear(8, 8), SelfAttention(8, 2, causal=True))
        apply(model, "gated-deltanet", chunk=4)
        return model

    def inputs(self, samples):
        return (torch.randn(samples, 6, 8, generator=_generator()),)


@given(
    length=st.integers(1, 40),
    chunk=st.integers(1, 45),
    keys=st.integers(1, 5),
    decay=st.sampled_from([0.01, 1.0, 100.0]),
    seed=st.integers(0, 99),
)
def test_both_forms_equal_the_loop(length, chunk, keys, decay, seed):
    *inputs, state = _inputs(length, keys, seed=seed, decay=decay)
    expected = _loop(*inputs, state)
    _assert_equal(gated_delta_rule(*inputs, initial_state=state, chunk=chunk), expected)
    _assert_equal(recurrent_gated_delta_rule(*inputs, initial_state=state), expected)


@pytest.mark.parametrize("chunk", [1, 5, 64])
def test_gradients_equal_those_of_the_recurrence(chunk):
    inputs = [x.requires_grad_() for x in _inputs(37)]
    gradients = []
    for function, options in ((gated_delta_rule, {"chunk": chunk}), (recurrent_gated_delta_rule, {})):
        o, state = function(*inputs[:5], initial_state=inputs[5], **options)
        gradients.append(torch.autograd.grad(o.square().mean() + state.square().mean(), inputs))
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_gradcheck_of_the_function():
    inputs = [x.requires_grad_() for x in _inputs(7, 2, 2, batch=1, heads=1, dtype=torch.float64)]

    def call(q, k, v, log_alpha, beta, state):
        return gated_delta_rule(q, k, v, log_alpha, beta, initial_state=state, chunk=4)

    assert torch.autograd.gradcheck(call, inputs)


@pytest.mark.parametrize("dropped", [-50.0, -1e4, float("-inf")])
def test_decays_near_zero_stay_finite_and_exact(dropped):
    q, k, v, log_alpha, beta, state = _inputs(100)
    closed = torch.rand(log_alpha.shape, generator=_generator(1)) < 0.2
    log_alpha = torch.where(closed, torch.tensor(dropped), log_alpha)
    inputs = [x.requires_grad_() for x in (q, k, v, log_alpha, beta, state)]
    found = gated_delta_rule(*inputs[:5], initial_state=inputs[5])
    _assert_equal([x.detach() for x in found], _loop(*(x.detach() for x in inputs)))
    assert all(x.isfinite().all() for x in torch.autograd.grad(found[0].sum(), inputs))


def test_decay_of_one_is_the_delta_rule():
    """DeltaNet's own formulation: what the state holds for a key moves towards the value by beta."""
    q, k, v, log_alpha, beta, _ = _inputs(30, batch=1, heads=1)
    o, _ = gated_delta_rule(q, k, v, torch.zeros_like(log_alpha), beta, chunk=8)
    s = torch.zeros(6, 5)
    for t in range(30):
        old = k[0, 0, t] @ s
        new = beta[0, 0, t] * v[0, 0, t] + (1 - beta[0, 0, t]) * old
        s = s - torch.outer(k[0, 0, t], old) + torch.outer(k[0, 0, t], new)
        torch.testing.assert_close(o[0, 0, t], q[0, 0, t] @ s, rtol=1e-4, atol=1e-5)


def test_strength_of_zero_only_decays():
    q, k, v, log_alpha, beta, state = _inputs(30)
    _, last = gated_delta_rule(q, k, v, log_alpha, torch.zeros_like(beta), initial_state=state, chunk=8)
    torch.testing.assert_close(last, log_alpha.sum(2).exp()[..., None, None] * state)


def test_a_value_written_at_full_strength_is_read_back_and_replaced():
    """What plain linear attention cannot do: with correlated keys, the last value of a key is returned unmixed."""
    g = _generator()
    k = F.normalize(torch.randn(1, 1, 3, 6, generator=g), dim=-1)
    keys = torch.cat([k, k[:, :, :1]], 2)
    v = torch.randn(1, 1, 4, 5, generator=g)
    o, _ = gated_delta_rule(keys, keys, v, torch.zeros(1, 1, 4), torch.ones(1, 1, 4))
    torch.testing.assert_close(o, v, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("chunk", [16, 64])
def test_equals_qwen3_next(chunk):
    qwen = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")
    *inputs, state = _inputs(100)
    theirs = [x.transpose(1, 2) for x in inputs]
    options = {"initial_state": state, "output_final_state": True}
    o, last = gated_delta_rule(*inputs, initial_state=state, chunk=chunk)
    for function in (qwen.torch_chunk_gated_delta_rule, qwen.torch_recurrent_gated_delta_rule):
        expected, final = function(*theirs, **options)
        torch.testing.assert_close(o, expected.transpose(1, 2) * 6**0.5, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(last, final, rtol=1e-4, atol=1e-5)


def test_layer_equals_qwen3_next():
    """The whole layer against Qwen3-Next's, weights copied into its layout: for each head q, k, v and gate in turn."""
    qwen = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")
    from transformers import Qwen3NextConfig

    config = Qwen3NextConfig(
        hidden_size=8,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=3,
        linear_value_head_dim=6,
        linear_conv_kernel_dim=4,
        num_hidden_layers=1,
        rms_norm_eps=1e-5,
        layer_types=["linear_attention"],
    )
    theirs, ours = qwen.Qwen3NextGatedDeltaNet(config, 0), GatedDeltaNet(8, 2)
    with torch.no_grad():
        ours.norm.weight.uniform_(0.5, 2.0)
        parts = [p.weight.view(2, -1, 8) for p in (ours.q_proj, ours.k_proj, ours.v_proj, ours.output_gate)]
        theirs.in_proj_qkvz.weight.copy_(torch.cat(parts, 1).flatten(0, 1))
        parts = [p.weight.view(2, 1, 8) for p in (ours.decay.b_proj, ours.decay.a_proj)]
        theirs.in_proj_ba.weight.copy_(torch.cat(parts, 1).flatten(0, 1))
        theirs.conv1d.weight.copy_(ours.conv.conv.weight)
        theirs.A_log.copy_(ours.decay.A_log)
        theirs.dt_bias.copy_(ours.decay.dt_bias)
        theirs.norm.weight.copy_(ours.norm.weight)
        theirs.out_proj.weight.copy_(ours.o_proj.weight)
    x = torch.randn(2, 20, 8, generator=_generator())
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)


def test_initial_decays():
    """softplus(dt_bias) is a step of 0.001 to 0.1, and exp(A_log) a rate of up to 16."""
    decay = GatedDeltaNet(512, 64).decay
    step = F.softplus(decay.dt_bias.double())
    assert 0.00099 < step.min() < 0.003
    assert 0.03 < step.max() < 0.101
    assert 0.0099 < decay.A_log.exp().min() < 4 < 12 < decay.A_log.exp().max() < 16.001


def test_low_precision_is_computed_in_float32():
    *inputs, _ = _inputs(40)
    exact, _ = gated_delta_rule(*inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(gated_delta_rule(*inputs)[0], exact)
    low, state = gated_delta_rule(*(x.bfloat16() for x in inputs))
    assert (low.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    assert (low.float() - exact).abs().max() <= 0.05 * exact.abs().max()


@pytest.mark.parametrize("function", [gated_delta_rule, recurrent_gated_delta_rule])
def test_no_places(function):
    *inputs, state = _inputs(0)
    o, last = function(*inputs, initial_state=state)
    assert o.shape == inputs[2].shape
    assert torch.equal(last, state)


def test_a_layer_of_no_places():
    x = torch.zeros(2, 0, 8)
    layer = GatedDeltaNet(8, 2)
    y, state = layer.advance(x)
    assert y.shape == x.shape
    later = torch.randn(2, 5, 8, generator=_generator())
    assert torch.equal(layer.advance(later, state)[0], layer(later))
    model = nn.Sequential(SelfAttention(8, 2, causal=True))
    apply(model, "gated-deltanet")
    assert model(x).shape == x.shape


def test_steps_continue_the_sequence():
    layer = GatedDeltaNet(8, 2, chunk=4)
    x = torch.randn(2, 11, 8, generator=_generator())
    outputs, state = [], None
    for part in x.split([5, 1, 1, 4], dim=1):
        y, state = layer.advance(part, state)
        outputs.append(y)
    torch.testing.assert_close(torch.cat(outputs, 1), layer(x), rtol=1e-4, atol=1e-6)


def test_it_is_causal():
    layer, x = GatedDeltaNet(8, 2, chunk=4), torch.randn(1, 9, 8, generator=_generator())
    other = x.clone()
    other[:, 5:] += 1
    assert torch.equal(layer(x)[:, :5], layer(other)[:, :5])


def test_cost_grows_linearly():
    """Counted, not timed: operations of matrix products for 8 times the length are 8 times as many."""
    from torch.utils.flop_counter import FlopCounterMode

    counts = []
    for length in (256, 2048):
        *inputs, _ = _inputs(length, 8, 8, batch=1, heads=1)
        with FlopCounterMode(display=False) as counter:
            gated_delta_rule(*inputs)
        counts.append(counter.get_total_flops())
    assert counts[1] == 8 * counts[0]


def test_apply_and_remove():
    model = nn.Sequential(SelfAttention(8, 2, causal=True), nn.Linear(8, 8))
    x, before = torch.randn(2, 5, 8, generator=_generator()), copy.deepcopy(model.state_dict())
    plain = model(x)
    assert list(apply(model, "gated-deltanet").changes) == ["0"]
    assert not torch.equal(model(x), plain)
    with pytest.raises(UsageError, match="'0' is a _ConvertedDelta already"):
        apply(model, "gated-deltanet")
    assert list(remove(model, "gated-deltanet").changes) == ["0"]
    assert torch.equal(model(x), plain)
    assert model.state_dict().keys() == before.keys()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"heads": 4}, "expand_k must give a width that 4 heads share evenly, got 0.75 of 8 = 6"),
        ({"short_conv": 0}, "covers at least 1 position"),
        ({"chunk": 0}, "chunk must be at least 1"),
        ({"eps": 0.0}, "eps must be above 0"),
    ],
)
def test_wrong_options(options, text):
    with pytest.raises(UsageError, match=text):
        GatedDeltaNet(8, **{"heads": 2, **options})


def test_wrong_shapes():
    q, k, v, log_alpha, beta, state = _inputs(5)
    for call, text in (
        (lambda: gated_delta_rule(q, k[..., :3], v, log_alpha, beta), "q and k must share"),
        (lambda: gated_delta_rule(q, k, v, log_alpha, beta[..., None]), "beta must have shape"),
        (lambda: gated_delta_rule(q, k, v, log_alpha[:1], beta), "log_alpha must have shape"),
        (lambda: gated_delta_rule(q, k, v, log_alpha, beta, initial_state=state[0]), "initial_state must have"),
        (lambda: recurrent_gated_delta_rule(q, k, v[0], log_alpha, beta), "v must be"),
    ):
        with pytest.raises(UsageError, match=text):
            call()
