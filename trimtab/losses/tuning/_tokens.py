"""What the losses of fine-tuning share: log-probabilities of tokens, and checks of weights and masks for them."""

from __future__ import annotations

import torch
from torch import Tensor

from trimtab.errors import UsageError
from trimtab.losses._reduction import check_logits, check_targets, working_dtype

__all__: list[str] = []


def token_log_probs(logits: Tensor, targets: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Return log softmax(logits)[target], 0 where a target does not count, and which ones count.

    Raises:
        UsageError: if the shapes or dtypes do not fit.
    """
    check_logits(logits)
    check_targets(logits, targets)
    valid = targets != ignore_index
    wide = logits.to(working_dtype(logits, None))
    # Zeroed before, not after: a position that does not count must not spoil the gradient of those that do.
    wide = torch.where(valid.unsqueeze(-1), wide, torch.zeros_like(wide))
    chosen = wide.gather(-1, targets.masked_fill(~valid, 0).unsqueeze(-1)).squeeze(-1)
    return torch.where(valid, chosen - wide.logsumexp(-1), torch.zeros_like(chosen)), valid


def check_mask(name: str, mask: Tensor, shape: torch.Size) -> Tensor:
    """Return a boolean mask.

    Raises:
        UsageError: if it is not boolean or does not have the shape.
    """
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != shape:
        kind = f"{mask.dtype} of {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise UsageError(f"{name} must be boolean of shape {tuple(shape)}, got {kind}.")
    return mask


def for_tokens(name: str, value: Tensor, like: Tensor) -> Tensor:
    """Return a number for each token, without gradient, from one for each token [B, L] or for each sequence [B].

    Raises:
        UsageError: if it has another shape.
    """
    if not isinstance(value, Tensor) or value.shape not in (like.shape, like.shape[:1]):
        shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise UsageError(f"{name} must have shape {tuple(like.shape)} or {tuple(like.shape[:1])}, got {shape}.")
    wide = value.detach().to(like.dtype)
    return wide if wide.shape == like.shape else wide.reshape(-1, *(1,) * (like.dim() - 1)).expand_as(like)
