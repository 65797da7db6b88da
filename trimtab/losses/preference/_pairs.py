"""What the losses of preferences share: checks of log-probabilities, the dtype of computation, and log-ratios."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trimtab.errors import UsageError


def log_probabilities(**given: Tensor) -> list[Tensor]:
    """Return log-probabilities of responses, in float32 or better.

    Args:
        **given: tensors by name, all of one shape [B]; each entry is the sum of a response's token log-probabilities.

    Raises:
        UsageError: if one is not floating point, or their shapes differ.
    """
    shape = next(iter(given.values())).shape
    for name, value in given.items():
        if not isinstance(value, Tensor) or not value.is_floating_point():
            kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise UsageError(f"{name} must be a floating-point tensor of log-probabilities, got {kind}.")
        if value.shape != shape:
            raise UsageError(
                f"log-probabilities must have one shape, got {tuple(shape)} and, for {name}, {tuple(value.shape)}."
            )
    wide = torch.float32
    for value in given.values():
        wide = torch.promote_types(wide, value.dtype)
    return [value.to(wide) for value in given.values()]


def lengths(like: Tensor, **given: Tensor) -> list[Tensor]:
    """Return numbers of tokens in the dtype of the log-probabilities.

    Raises:
        UsageError: if their shape is not that of the log-probabilities, or a response has no token.
    """
    found = []
    for name, value in given.items():
        if not isinstance(value, Tensor) or value.shape != like.shape:
            shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise UsageError(
                f"{name} must hold a number of tokens for each response, {tuple(like.shape)}, got {shape}."
            )
        if not bool((value > 0).all()):
            raise UsageError(f"{name} must be above 0 everywhere: leave out responses without tokens.")
        found.append(value.to(like.dtype))
    return found


def check_number(name: str, value: Any, low: float, high: float = math.inf, *, open_low: bool = False) -> float:
    """Return an option of a loss.

    Raises:
        UsageError: if it is not a number in [low, high], or (low, high] where `open_low` is set.
    """
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not number or value < low or value > high or (open_low and value == low):
        bound = f"above {low:g}" if open_low else f"at least {low:g}"
        raise UsageError(f"{name} must be {bound}{f' and at most {high:g}' if high < math.inf else ''}, got {value!r}.")
    return float(value)


def logistic(margin: Tensor, label_smoothing: float) -> Tensor:
    """Return -(1 - e) log sigmoid(h) - e log sigmoid(-h), the loss of a margin h under labels flipped with odds e."""
    if not label_smoothing:
        return -F.logsigmoid(margin)
    return -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)
