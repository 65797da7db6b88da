"""Tensors become numbers in one place, which is right for sharded tensors too."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from trimtab.scalars import to_floats, to_local_full, to_scalar
from trimtab.testing import run_ranks


@pytest.mark.parametrize("value", [2.5, 2, torch.tensor(2.5), torch.tensor([[7]]), torch.tensor(True)])
def test_one_element(value):
    assert to_scalar(value) == float(value)
    assert type(to_scalar(value)) is float


def test_keeps_what_is_not_finite_and_needs_no_gradient():
    assert math.isnan(to_scalar(torch.tensor(math.nan)))
    assert to_scalar(torch.tensor(-math.inf, requires_grad=True)) == -math.inf


@pytest.mark.parametrize("shape", [(0,), (2,), (1, 3)])
def test_more_or_less_than_one_element(shape):
    with pytest.raises(ValueError, match="needs one element, got shape"):
        to_scalar(torch.zeros(shape))


def test_floats_keep_order_and_dtype_mixes():
    tensors = [torch.tensor([1.0, 2.0]), torch.tensor(3), torch.zeros(0), torch.tensor([[4.5]], dtype=torch.bfloat16)]
    assert to_floats(tensors) == [[1.0, 2.0], [3.0], [], [4.5]]
    assert to_floats([]) == []


def test_plain_tensors_are_themselves():
    x = torch.zeros(3)
    assert to_local_full(x) is x


def test_sharded_and_partial_tensors_are_read_whole():
    def work(rank):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        torch.manual_seed(0)
        model = nn.Linear(4, 6)
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
        model(torch.ones(1, 4)).square().sum().backward()
        gradient = model.weight.grad
        poisoned = gradient.clone()
        if rank == 1:
            poisoned.to_local().fill_(math.nan)
        return {
            "whole": to_scalar(gradient.norm()),
            "local": float(gradient.to_local().norm()),
            "poisoned": to_scalar(poisoned.sum()),
            "floats": to_floats([gradient.norm(), torch.tensor([1.0])]),
            "shape": tuple(to_local_full(gradient).shape),
        }

    torch.manual_seed(0)
    model = nn.Linear(4, 6)
    model(torch.ones(1, 4)).square().sum().backward()
    exact = float(model.weight.grad.norm())
    for result in run_ranks(work):
        assert result["whole"] == pytest.approx(exact, rel=1e-6)
        assert result["local"] < 0.99 * exact  # what a raw read would have given
        assert math.isnan(result["poisoned"])  # a NaN of rank 1 is seen on rank 0
        assert result["floats"] == [[pytest.approx(exact, rel=1e-6)], [1.0]]
        assert result["shape"] == (6, 4)
