"""Call any model and take a loss of what it returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.errors import UsageError, reason


def call(model: nn.Module, inputs: Any) -> Any:
    """Call a model with a tensor, a sequence of arguments or a mapping of keywords.

    Raises:
        UsageError: if it cannot be.
    """
    try:
        return _call(model, inputs)
    except Exception as error:
        raise UsageError(f"the model cannot be run on these inputs: {reason(error)}.") from error


def _call(model: nn.Module, inputs: Any) -> Any:
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, (tuple, list)):
        return model(*inputs)
    return model(inputs)


def logits_of(outputs: Any) -> Tensor:
    """Return the tensor that counts: the output, its `logits`, or the first tensor in it.

    Raises:
        UsageError: if there is none.
    """
    if isinstance(outputs, Tensor):
        return outputs
    named = outputs.get("logits") if isinstance(outputs, Mapping) else getattr(outputs, "logits", None)
    if isinstance(named, Tensor):
        return named
    values = outputs.values() if isinstance(outputs, Mapping) else outputs if isinstance(outputs, (tuple, list)) else ()
    found = next((value for value in values if isinstance(value, Tensor)), None)
    if found is None:
        raise UsageError(f"the model returns a {type(outputs).__name__} without a tensor: return one, or its logits.")
    return found


def loss_of(outputs: Any, logits: Tensor, loss: Callable[[Any, Any], Tensor] | None, targets: Any) -> Tensor:
    """Return the loss, or without targets one whose gradient at the output is independent, of variance 1.

    Raises:
        UsageError: if it cannot be taken, or is no scalar.
    """
    if targets is None:
        generator = torch.Generator().manual_seed(0)
        return (logits * torch.randn(logits.shape, generator=generator).to(logits)).sum()
    try:
        value = _default_loss(logits, targets) if loss is None else loss(outputs, targets)
    except Exception as error:
        raise UsageError(f"the loss cannot be taken of these outputs and targets: {reason(error)}.") from error
    if not isinstance(value, Tensor) or value.numel() != 1:
        what = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise UsageError(f"the loss must be a tensor of one element, got {what}: take its mean.")
    return value.reshape(())


def _default_loss(logits: Tensor, targets: Tensor) -> Tensor:
    if targets.is_floating_point():
        return F.mse_loss(logits, targets)
    dim = class_dim(logits, targets)
    if dim is None:
        raise ValueError(f"outputs {tuple(logits.shape)} and targets {tuple(targets.shape)} do not fit: give a loss")
    return F.cross_entropy(logits.movedim(dim, -1).reshape(targets.numel(), -1), targets.reshape(-1).long())


def class_dim(logits: Tensor, targets: Any) -> int | None:
    """Return the dimension of the classes, or None where the targets are none."""
    if not isinstance(targets, Tensor) or targets.is_floating_point() or logits.dim() != targets.dim() + 1:
        return None
    if logits.shape[:-1] == targets.shape:
        return -1
    return 1 if logits.shape[:1] + logits.shape[2:] == targets.shape else None
