"""What all losses of representations hold: they compile, are pure, and hide no diverged input."""

from __future__ import annotations

import math

import pytest
import torch

from trimtab.losses import (
    dense_contrastive_loss,
    epps_pulley,
    guidance_loss,
    lejepa_loss,
    linear_cka,
    multiple_negatives_ranking_loss,
    supcl_seq_loss,
)

_LABELS = torch.tensor([0, 1, 0, 2, 1, 1])


def _dense(x):
    places = torch.stack([x, x.roll(1, 0), x.roll(1, 1)], dim=2)
    return dense_contrastive_loss(x, x.flip(1), places, places.flip(2), places, places.roll(1, 2))


_LOSSES = {
    "cka": lambda x: linear_cka(x, x.detach() ** 2),
    "cka-unbiased": lambda x: linear_cka(x, x.detach() ** 2, unbiased=True),
    "dense-contrastive": _dense,
    "epps-pulley": lambda x: epps_pulley(x).mean(),
    "guidance": lambda x: guidance_loss([x, 2 * x], [x.exp(), x.sin()]),
    "multiple-negatives": lambda x: multiple_negatives_ranking_loss(x, x.flip(1), symmetric=True),
    "supcl-seq": lambda x: supcl_seq_loss(torch.stack([x, x.roll(1, 1)]), _LABELS),
}
_COMPILED = ["cka-unbiased", "dense-contrastive", "multiple-negatives", "supcl-seq"]
_LOSSES["lejepa"] = lambda x: lejepa_loss(torch.stack([x, x.roll(1, 1)]), 3, slices=8)


def _input():
    return torch.randn(6, 5, generator=torch.Generator().manual_seed(0))


def _run(loss, x):
    leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    value = loss(leaf)
    value.backward()
    return value.detach(), leaf.grad


@pytest.mark.parametrize("name", _COMPILED)
def test_compiles(name):
    torch._dynamo.reset()
    compiled = torch.compile(_LOSSES[name], backend="aot_eager", fullgraph=True)
    for found, expected in zip(_run(compiled, _input()), _run(_LOSSES[name], _input()), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", sorted(_LOSSES))
def test_pure_and_deterministic(name):
    x, state = _input(), torch.get_rng_state()
    before = x.clone()
    first, second = _run(_LOSSES[name], x), _run(_LOSSES[name], x)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    assert torch.equal(x, before)
    assert torch.equal(torch.get_rng_state(), state)
    scattered = x.T.contiguous().T
    assert not scattered.is_contiguous()
    torch.testing.assert_close(_run(_LOSSES[name], scattered), first)


@pytest.mark.parametrize("name", sorted(_LOSSES))
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_diverged_input_is_not_hidden(name, value):
    x = _input()
    x[0, 0] = value
    assert not _LOSSES[name](x).isfinite()
