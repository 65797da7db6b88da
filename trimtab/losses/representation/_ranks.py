"""Sums and gathers over ranks that have gradients, for losses that need the whole batch.

The loss of the whole batch is computed on every rank, and the backward pass adds up what the losses of all ranks ask
of this rank's samples. That is `world size` times the gradient of one such loss, so that gradients that are *averaged*
over ranks, as DistributedDataParallel and FSDP do, are those of the whole batch in a single process.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from trimtab.errors import UsageError
from trimtab.losses._reduction import reduce


def check_group(group: dist.ProcessGroup | None) -> None:
    """Raise a UsageError if there is no process group to communicate over."""
    if not (dist.is_available() and dist.is_initialized()):
        raise UsageError(
            f"all_ranks needs an initialised torch.distributed, got group {group!r} without one: leave all_ranks out."
        )


def sum_over_ranks(x: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Return the sum of a tensor over ranks, on every rank; all must give the same shape."""
    return _Sum.apply(x, group)


def gather_over_ranks(x: Tensor, group: dist.ProcessGroup | None = None) -> tuple[Tensor, int]:
    """Return the rows of all ranks in order of rank, and the index of this rank's first one.

    Args:
        x: [B, ...]; B may differ between ranks.
        group: the process group; None for the default one.

    Raises:
        UsageError: if torch.distributed is not initialised.
    """
    check_group(group)
    sizes_R = torch.zeros(dist.get_world_size(group), dtype=torch.int64, device=x.device)
    sizes_R[dist.get_rank(group)] = x.shape[0]
    dist.all_reduce(sizes_R, group=group)
    sizes = [int(size) for size in sizes_R.tolist()]
    return _Gather.apply(x, sizes, group), sum(sizes[: dist.get_rank(group)])


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        total = x.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        total = gradients[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return total, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: list[int], group: dist.ProcessGroup | None) -> Tensor:
        ctx.sizes, ctx.group = sizes, group
        # Collectives want equal shapes: every rank pads to the largest.
        padded = x.new_zeros(max(sizes), *x.shape[1:])
        padded[: x.shape[0]] = x.detach()
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded, group=group)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        total = gradients[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return total.split(ctx.sizes)[dist.get_rank(ctx.group)], None, None


def reduce_over_ranks(
    values: Tensor,
    valid: Tensor | None,
    reduction: str,
    denominator: float | Tensor | None,
    *,
    all_ranks: bool = False,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Reduce values of single samples, of this rank or of all ranks; `"none"` gives those of this rank.

    Raises:
        UsageError: if the reduction or the denominator breaks its rule.
    """
    if not all_ranks or reduction == "none":
        return reduce(values, valid, reduction, denominator)
    if reduction == "mean" and denominator is None:
        count = values.new_tensor(float(values.numel())) if valid is None else valid.sum().to(values.dtype)
        dist.all_reduce(count, group=group)
        denominator = count.clamp(min=1)
    return sum_over_ranks(reduce(values, valid, reduction, denominator), group)
