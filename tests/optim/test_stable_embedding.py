"""Stable embedding against its equation in float64 and against the authors' layer."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch

from trimtab.optim.stable_embedding import StableEmbedding


def _layer(**options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return StableEmbedding(50, 16, **options)


def test_equals_the_equation():
    layer = _layer()
    ids = torch.tensor([[3, 0, 49], [3, 7, 8]])
    rows = layer.weight.detach().double().numpy()[ids.numpy()]
    centred = rows - rows.mean(axis=-1, keepdims=True)
    expected = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(layer(ids).detach().numpy(), expected, rtol=1e-5, atol=1e-6)


def test_weights_are_xavier_uniform():
    with torch.random.fork_rng():
        torch.manual_seed(1)
        weight = StableEmbedding(2000, 100).weight.detach()
    bound = math.sqrt(6 / 2100)
    assert weight.abs().max() <= bound
    assert weight.abs().max() > 0.999 * bound
    assert weight.var().item() == pytest.approx(bound**2 / 3, rel=0.02)


def test_equals_the_authors_layer():
    peer = pytest.importorskip("bitsandbytes").nn.StableEmbedding(50, 16, padding_idx=2)
    layer = _layer(padding_idx=2)
    layer.load_state_dict(peer.state_dict())
    ids = torch.tensor([1, 2, 3, 1])
    for module in (layer, peer):
        module(ids).square().mul(torch.arange(16.0)).sum().backward()
    assert torch.equal(layer(ids), peer(ids))
    assert torch.equal(layer.weight.grad, peer.weight.grad)
    assert layer.weight.grad[2].count_nonzero() == 0


def test_weight_asks_for_states_in_32_bits():
    layer = _layer()
    assert layer.weight.optim_state == "fp32"
    assert not hasattr(layer.norm.weight, "optim_state")
    assert copy.deepcopy(layer).weight.optim_state == "fp32"
    assert layer.to("meta").weight.optim_state == "fp32"


def test_padding_and_half_precision():
    layer = _layer(padding_idx=0, dtype=torch.bfloat16)
    assert layer.weight[0].count_nonzero() == 0
    assert layer(torch.tensor([1])).dtype == torch.bfloat16
    assert layer.norm.weight.dtype == torch.float32
    assert layer(torch.empty(0, dtype=torch.long)).shape == (0, 16)
