"""What the losses over classes share: checks of their arguments, and a mean whose divisor the caller can give."""

from __future__ import annotations

import torch
from torch import Tensor

from trimtab.errors import UsageError, choose

REDUCTIONS = ("mean", "sum", "none")


def check_logits(logits: Tensor) -> None:
    """Raise a UsageError unless logits are floating point, with the classes in the last dimension."""
    if not logits.is_floating_point() or logits.dim() < 1 or logits.shape[-1] < 1:
        raise UsageError(
            f"logits must be floating point with classes in the last dimension, got {logits.dtype} of shape "
            f"{tuple(logits.shape)}."
        )


def check_targets(logits: Tensor, targets: Tensor) -> None:
    """Raise a UsageError unless targets are class indices, one for each row of logits."""
    if targets.is_floating_point() or targets.dtype == torch.bool:
        raise UsageError(
            f"targets must be class indices (int64), got {targets.dtype}: probabilities are not supported."
        )
    if targets.shape != logits.shape[:-1]:
        raise UsageError(
            f"targets of shape {tuple(targets.shape)} do not fit logits of shape {tuple(logits.shape)}: classes go in "
            "the last dimension, targets have the shape of the others."
        )


def working_dtype(logits: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """Return the dtype to compute in: `dtype`, or float32, or the logits' own where that is wider.

    Raises:
        UsageError: if `dtype` is not float32 or float64.
    """
    if dtype is None:
        return torch.promote_types(logits.dtype, torch.float32)
    if dtype not in (torch.float32, torch.float64):
        raise UsageError(f"dtype must be torch.float32 or torch.float64, got {dtype}: half precision loses the loss.")
    return dtype


def reduce(values: Tensor, valid: Tensor | None, reduction: str, denominator: float | Tensor | None) -> Tensor:
    """Reduce the values of single samples, those that are not valid left out.

    Args:
        values: one value a sample.
        valid: which samples count, of the same shape; None for all.
        reduction: `"mean"`, `"sum"` or `"none"` (one value a sample, 0 where it does not count).
        denominator: what a mean divides by in place of its number of valid samples.

    Raises:
        UsageError: if the reduction is unknown, or the denominator is not above 0 or given without a mean.
    """
    _check_reduction(reduction, denominator)
    kept = values if valid is None else torch.where(valid, values, torch.zeros_like(values))
    if reduction == "none":
        return kept
    return divide(kept.sum(), values.numel() if valid is None else valid.sum(), reduction, denominator)


def divide(total: Tensor, count: int | Tensor, reduction: str, denominator: float | Tensor | None) -> Tensor:
    """Return the sum or the mean that belongs to a total.

    Args:
        total: sum over the samples that count.
        count: how many those are.
        reduction: `"mean"` or `"sum"`.
        denominator: what a mean divides by in place of `count`.

    Raises:
        UsageError: as `reduce` does.
    """
    _check_reduction(reduction, denominator)
    if reduction == "sum":
        return total
    if denominator is None:
        # A batch without any valid sample has loss 0 and gradient 0, as it contributes nothing.
        return total / (count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1))
    return total / denominator


def _check_reduction(reduction: str, denominator: float | Tensor | None) -> None:
    choose("reduction", reduction, REDUCTIONS)
    if denominator is None:
        return
    if reduction != "mean":
        raise UsageError(
            f"denominator is what a mean divides by, but reduction is {reduction!r}: leave one of them out."
        )
    if not isinstance(denominator, Tensor) and not denominator > 0:
        raise UsageError(f"denominator must be above 0, got {denominator}: give the number of targets that count.")
