"""Tell whether parameters are sharded, for methods that need whole ones."""

from __future__ import annotations

from torch import nn


def is_sharded(module: nn.Module) -> bool:
    """Return whether a module has parameters that FSDP2 or tensor parallelism has sharded."""
    return any(hasattr(parameter, "full_tensor") for parameter in module.parameters())
