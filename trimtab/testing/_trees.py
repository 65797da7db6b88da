"""Comparison of state dicts: trees of tensors and plain values."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def values_of(model: nn.Module) -> list[Tensor]:
    """Return copies of a model's parameters."""
    return [p.detach().clone() for p in model.parameters()]


def assert_same_tree(left: Any, right: Any, place: str = "state") -> None:
    """Assert equal keys, values, dtypes, shapes and strides."""
    if isinstance(left, Tensor):
        assert isinstance(right, Tensor), place
        assert (left.dtype, left.shape, left.stride()) == (right.dtype, right.shape, right.stride()), place
        assert left.equal(right), place
    elif isinstance(left, dict):
        assert left.keys() == right.keys(), place
        for key in left:
            assert_same_tree(left[key], right[key], f"{place}[{key!r}]")
    elif isinstance(left, (list, tuple)):
        assert len(left) == len(right), place
        for index, (x, y) in enumerate(zip(left, right, strict=True)):
            assert_same_tree(x, y, f"{place}[{index}]")
    else:
        assert left == right, place
