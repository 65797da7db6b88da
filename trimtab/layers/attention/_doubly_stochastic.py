"""What doubly stochastic attentions share: none of them can be causal."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from trimtab.errors import UsageError
from trimtab.layers._self_attention import ConvertedAttention, attentions


def check_not_causal(method: str, modules: Mapping[str, nn.Module]) -> None:
    """Raise a UsageError if one of the modules, by what an error calls them, is causal."""
    for name, module in modules.items():
        if getattr(module, "causal", False):
            raise UsageError(
                f"{method}: {name} is causal, and the only doubly stochastic matrix without a future is the "
                "identity: use it in encoders."
            )


def convert_encoders(
    model: nn.Module, method: str, kind: type[ConvertedAttention], **options: object
) -> dict[str, nn.Module]:
    """Turn every attention of a model into a `kind`, in place, and return them; a causal one refuses them all."""
    found = attentions(model, method)
    check_not_causal(method, {repr(name): module for name, module in found.items()})
    for module in found.values():
        kind.convert(module, **options)
    return found
