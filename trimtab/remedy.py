"""Apply a method to a model in place, and undo it where that is meaningful."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from trimtab.catalogue import method
from trimtab.errors import UsageError


@dataclass(frozen=True)
class Applied:
    """What a method changed in a model: `changes` maps each module's name to what was done to it."""

    method: str
    changes: Mapping[str, str]

    def __str__(self) -> str:
        lines = [f"{self.method}: {len(self.changes)} module(s) changed"]
        lines += [f"  {module or '(the model)'}: {what}" for module, what in self.changes.items()]
        return "\n".join(lines)


def apply(model: nn.Module, name: str, **options: Any) -> Applied:
    """Apply a method to a model in place and say what it changed.

    Args:
        model: the model to change.
        name: a method's name, as `trimtab methods` lists them.
        **options: the method's own options.

    Returns:
        The changes, module by module.

    Raises:
        UsageError: if there is no such method, if it does not act on models or has not these options, or if it finds
            nothing to change.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> print(apply(model, "sigma-reparam"))
        sigma-reparam: 2 module(s) changed
          0: weight = gamma / sigma(W) * W, gamma = 1
          2: weight = gamma / sigma(W) * W, gamma = 1
    """
    card = method(name)
    if not isinstance(model, nn.Module):
        raise UsageError(f"apply needs a torch.nn.Module to change, got {type(model).__name__}.")
    if card.acts_on != "model" or card.apply is None:
        raise UsageError(f"{name} acts on the {card.acts_on}, not on the model: use {card.entry.replace(':', '.')}.")
    try:
        inspect.signature(card.apply).bind(model, **options)
    except TypeError as error:
        raise UsageError(f"{name}: {error}: {card.entry.replace(':', '.')} describes its options.") from None
    changes = card.apply(model, **options)
    if not changes:
        raise UsageError(f"{name} found nothing to change in {type(model).__name__}.")
    return Applied(name, changes)


def remove(model: nn.Module, name: str) -> Applied:
    """Undo a method that `apply` put into a model: merged where the method allows it, otherwise taken out.

    Raises:
        UsageError: if there is no such method, if it cannot be undone, or if the model does not carry it.
    """
    card = method(name)
    if card.remove is None:
        raise UsageError(f"{name} cannot be removed from a model: keep a copy from before it was applied.")
    changes = card.remove(model)
    if not changes:
        raise UsageError(f"{name} is not applied to {type(model).__name__}: nothing to remove.")
    return Applied(name, changes)
