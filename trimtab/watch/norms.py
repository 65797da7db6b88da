"""L2 norms of many tensors at once, right for sharded tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trimtab.scalars import to_local_full


def l2_norms(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the L2 norm of each tensor as a plain float32 (or float64) tensor [], in order.

    Half precision is accumulated in float32. The norm of a DTensor is the norm of the whole tensor: its shards' parts
    are reduced over the ranks, so every rank must call this with the same tensors.
    """
    norms: list[Tensor] = [torch.empty(0)] * len(tensors)
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for index, tensor in enumerate(tensors):
        groups.setdefault((tensor.device, tensor.dtype), []).append(index)
    for (_, dtype), indices in groups.items():
        half = dtype in (torch.float16, torch.bfloat16)
        # No dtype argument: DTensor's foreach norm has none. Sparse gradients have no foreach norm either.
        chosen = [
            tensors[index].coalesce().values() if tensors[index].is_sparse else tensors[index] for index in indices
        ]
        chosen = [tensor.float() if half else tensor for tensor in chosen]
        for index, norm in zip(indices, torch._foreach_norm(chosen), strict=True):
            norms[index] = to_local_full(norm)
    return norms
