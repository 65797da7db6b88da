"""Find the residual branches x + f(norm(x)) of a model's pre-norm blocks, in the shapes that models come in."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.errors import UsageError
from trimtab.layers._sharding import is_sharded

LAYOUTS: tuple[tuple[tuple[str, str], ...], ...] = (
    (("norm1", "attention"), ("norm2", "mlp")),
    (("norm1", "attn"), ("norm2", "mlp")),
    (("input_layernorm", "self_attn"), ("post_attention_layernorm", "mlp")),
    (("layer_norm1", "self_attn"), ("layer_norm2", "mlp")),
    (("ln_1", "attn"), ("ln_cross_attn", "crossattention"), ("ln_2", "mlp")),
    (("ln_1", "attn"), ("ln_2", "mlp")),
)
"""Attribute names of the norm and the sublayer of each branch of a block."""

TORCH_LAYOUTS: tuple[tuple[tuple[str, str], ...], ...] = (
    (("norm1", "self_attn"), ("norm2", "linear2")),
    (("norm1", "self_attn"), ("norm2", "multihead_attn"), ("norm3", "linear2")),
)
"""The same for nn.TransformerEncoderLayer and nn.TransformerDecoderLayer."""

LOOKED_FOR = (
    "nn.TransformerEncoderLayer and nn.TransformerDecoderLayer with norm_first=True, and blocks x + f(norm(x)) that "
    "have " + "; ".join(", ".join(name for pair in layout for name in pair) for layout in LAYOUTS)
)
"""What `residual_branches` recognises, in words for an error message."""


@dataclass(frozen=True)
class Branch:
    """One residual branch x + f(norm(x)).

    Args:
        block: name in the model of the block that it belongs to.
        module: that block.
        norm: the block's attribute that holds the norm.
        sublayer: path within the block of f, or of its last part.
    """

    block: str
    module: nn.Module
    norm: str
    sublayer: str

    @property
    def name(self) -> str:
        """Name in the model of the module whose output is added."""
        return f"{self.block}.{self.sublayer}" if self.block else self.sublayer

    @property
    def input_norm(self) -> nn.Module:
        """The norm in front of the sublayer."""
        return getattr(self.module, self.norm)

    @property
    def function(self) -> nn.Module:
        """The module whose output is added."""
        return self.module.get_submodule(self.sublayer)


def residual_branches(model: nn.Module, method: str) -> list[Branch]:
    """Return the branches of all pre-norm blocks of a model, in order.

    Args:
        model: the model.
        method: name of the method that wants them, for error messages.

    Raises:
        UsageError: if there is none, their parameters are sharded already, or two share a sublayer.
    """
    found = [branch for name, module in model.named_modules() for branch in _branches(name, module)]
    if not found:
        raise UsageError(f"{method}: no pre-norm block was found in {type(model).__name__}. Looked for {LOOKED_FOR}.")
    for branch in found:
        if is_sharded(branch.module):
            raise UsageError(f"{method}: {branch.block!r} is sharded already: apply it before fully_shard.")
    owners: dict[int, str] = {}
    for branch in found:
        if (owner := owners.setdefault(id(branch.function), branch.name)) != branch.name:
            raise UsageError(f"{method}: {branch.name!r} and {owner!r} are one module, which cannot have both norms.")
    return found


def first_blocks(branches: list[Branch]) -> dict[str, nn.Module]:
    """Return the first block of each container of blocks, by name."""
    firsts: dict[str, tuple[str, nn.Module]] = {}
    for branch in branches:
        firsts.setdefault(branch.block.rpartition(".")[0], (branch.block, branch.module))
    return dict(firsts.values())


def norm_like(norm: nn.Module, method: str) -> nn.Module:
    """Return a new norm of a norm's kind, width, epsilon, device and dtype, with gain 1 and, if any, bias 0.

    Raises:
        UsageError: if it is neither a LayerNorm nor an RMSNorm.
    """
    weight = getattr(norm, "weight", None)
    shape = getattr(norm, "normalized_shape", None) or (None if weight is None else tuple(weight.shape))
    eps = next(
        (value for name in ("eps", "variance_epsilon") if (value := getattr(norm, name, None)) is not None), None
    )
    place = {} if weight is None else {"device": weight.device, "dtype": weight.dtype}
    if isinstance(norm, nn.LayerNorm):
        return nn.LayerNorm(norm.normalized_shape, norm.eps, bias=norm.bias is not None, **place)
    if shape is None or "rmsnorm" not in type(norm).__name__.lower():
        raise UsageError(f"{method}: {type(norm).__name__} is neither a LayerNorm nor an RMSNorm with a weight.")
    return nn.RMSNorm(tuple(shape), eps=eps, **place)


def normalized(norm: nn.Module, output: Any) -> Any:
    """Return a sublayer's output, or the first part of a tuple, normalised in the norm's precision or better."""
    if isinstance(output, (tuple, list)):
        return type(output)((normalized(norm, output[0]), *output[1:]))
    return _in_own_precision(norm, output)


def _in_own_precision(norm: nn.Module, x: Tensor) -> Tensor:
    weight = getattr(norm, "weight", None)
    wide = x if weight is None else x.to(torch.promote_types(x.dtype, weight.dtype))
    return norm(wide).to(x.dtype)


def forget_fused_paths(model: nn.Module, branches: list[Branch]) -> None:
    """Make nn.TransformerEncoder call its layers: its nested-tensor path relies on their fused inference path."""
    changed = {id(branch.module) for branch in branches}
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and any(id(part) in changed for part in module.modules()):
            module.use_nested_tensor = False


def detach_hook(module: nn.Module, hook: Callable[..., Any]) -> bool:
    """Take a forward hook or forward pre-hook off a module, and return whether it was there."""
    for table in (module._forward_hooks, module._forward_pre_hooks):
        for handle in [handle for handle, registered in table.items() if registered is hook]:
            del table[handle]
            return True
    return False


def _branches(name: str, module: nn.Module) -> list[Branch]:
    for kind, layout in zip((nn.TransformerEncoderLayer, nn.TransformerDecoderLayer), TORCH_LAYOUTS, strict=True):
        if isinstance(module, kind):
            fits = type(module).forward is kind.forward and bool(module.norm_first)
            return [Branch(name, module, norm, part) for norm, part in layout] if fits else []
    for layout in LAYOUTS:
        parts = {part for pair in layout for part in pair}
        has_parts = all(isinstance(getattr(module, part, None), nn.Module) for part in parts)
        if has_parts and not _others(module, parts) and all(_comes_before(type(module), *pair) for pair in layout):
            return [Branch(name, module, norm, _last(module, part)) for norm, part in layout]
    return []


def _last(block: nn.Module, path: str) -> str:
    """Return the path of the module that computes a sublayer's output: what is added to an nn.Sequential runs in it."""
    part = block.get_submodule(path)
    while isinstance(part, nn.Sequential) and type(part).forward is nn.Sequential.forward and len(part):
        path, part = f"{path}.{len(part) - 1}", part[-1]
    return path


def _others(module: nn.Module, parts: set[str]) -> bool:
    """Return whether a block has norms of its own besides, as Gemma 2's blocks do, which norm outputs already."""
    names = [name for name, part in module.named_children() if not isinstance(part, nn.Identity)]
    own = {*parts, "embedding_norm"}
    return any("norm" in name.lower() or name.startswith("ln") for name in names if name not in own)


def _comes_before(kind: type[nn.Module], norm: str, sublayer: str) -> bool:
    """Return whether `forward` normalises before it calls the sublayer: post-norm blocks use the same names."""
    try:
        source = inspect.getsource(kind.forward)
    except (OSError, TypeError):
        return False
    call, norm_call = (rf"self\.{name}\(" for name in (sublayer, norm))
    if re.search(rf"{call}\s*{norm_call}", source):
        return True
    if re.search(rf"{norm_call}[^)]*self\._?{sublayer}\(", source):
        return False
    first, sub = re.search(norm_call, source), re.search(call, source)
    return first is not None and sub is not None and first.start() < sub.start()
