"""The one way from a tensor to a number, right for sharded tensors too."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def to_local_full(tensor: Tensor) -> Tensor:
    """Return the whole tensor on this rank: a DTensor is gathered and its partial sums reduced, a plain one is itself.

    On a sharded gradient `gradient.norm()` is a DTensor that holds this rank's part only; reading it with `.item()`
    gives a number that is silently wrong.
    """
    gather = getattr(tensor, "full_tensor", None)
    return gather() if gather is not None else tensor


def to_scalar(value: Tensor | float) -> float:
    """Turn a one-element tensor, DTensor or number into a Python float.

    Raises:
        ValueError: if the tensor has more than one element.

    Example:
        >>> to_scalar(torch.tensor([2.5]))
        2.5
    """
    if not isinstance(value, Tensor):
        return float(value)
    full = to_local_full(value.detach())
    if full.numel() != 1:
        raise ValueError(f"to_scalar needs one element, got shape {tuple(full.shape)}: reduce it first.")
    return float(full.item())


def to_floats(values: Sequence[Tensor]) -> list[list[float]]:
    """Turn small tensors into lists of floats with one transfer per device.

    Shapes: each tensor is read flat; the result keeps their order.

    Example:
        >>> to_floats([torch.tensor(1.0), torch.tensor([2.0, 3.0])])
        [[1.0], [2.0, 3.0]]
    """
    flat = [to_local_full(value.detach()).reshape(-1).to(torch.float64) for value in values]
    by_device: dict[torch.device, list[int]] = {}
    for index, tensor in enumerate(flat):
        by_device.setdefault(tensor.device, []).append(index)
    result: list[list[float]] = [[] for _ in flat]
    for indices in by_device.values():
        numbers = torch.cat([flat[index] for index in indices]).tolist()
        start = 0
        for index in indices:
            stop = start + flat[index].numel()
            result[index] = numbers[start:stop]
            start = stop
    return result
