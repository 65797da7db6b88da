"""Self-attention over one fused projection, with a core that methods replace.

A method that changes what happens between the projections is a subclass with its own `attend`; `convert` makes one of a
module that a model already has, weights and all, and `revert` undoes it.

Shape suffixes: B batch, L length, D width, H heads, K width of a head.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.errors import UsageError
from trimtab.layers._sharding import is_sharded

_TIMM = ("timm.models.vision_transformer.Attention", "timm.layers.attention.Attention")

LOOKED_FOR = "trimtab's SelfAttention or timm's Attention: a fused qkv, laid out (3, H, K), and an output proj"
"""What `convertible` recognises, in words for an error message."""


class SelfAttention(nn.Module):
    """Multi-head self-attention with a fused `qkv` projection, laid out (3, H, K), and slots for QK-norm.

    Args:
        width: D, a multiple of `heads`.
        heads: H.
        causal: whether a position sees only itself and what is before it.
        bias: whether the projections have biases.

    Raises:
        UsageError: if the heads do not share the width evenly.
    """

    def __init__(self, width: int, heads: int, *, causal: bool, bias: bool = False) -> None:
        super().__init__()
        if heads < 1 or width < 1 or width % heads:
            raise UsageError(f"a transformer's width must be a multiple of its {heads} heads, got {width}.")
        self.num_heads = heads
        self.head_dim = width // heads
        self.causal = causal
        self.qkv = nn.Linear(width, 3 * width, bias=bias)
        self.q_norm: nn.Module = nn.Identity()
        self.k_norm: nn.Module = nn.Identity()
        self.proj = nn.Linear(width, width, bias=bias)

    def forward(self, x_BLD: Tensor) -> Tensor:
        """Return the attention's output, [B, L, D]."""
        return self.project(self.attend(*self.split(x_BLD), x_BLD))

    def split(self, x_BLD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the heads' queries and keys, behind their norms, and values, [B, H, L, K] each."""
        batch, length, _ = x_BLD.shape
        qkv = self.qkv(x_BLD).view(batch, length, 3, self.num_heads, self.head_dim)
        q_BHLK, k_BHLK, v_BHLK = qkv.permute(2, 0, 3, 1, 4)
        return self.q_norm(q_BHLK), self.k_norm(k_BHLK), v_BHLK

    def project(self, y_BHLK: Tensor) -> Tensor:
        """Return the output that the heads' outputs make, [B, L, D]."""
        return self.proj(y_BHLK.transpose(1, 2).flatten(-2))

    def attend(self, q_BHLK: Tensor, k_BHLK: Tensor, v_BHLK: Tensor, x_BLD: Tensor) -> Tensor:
        """Return the heads' outputs, [B, H, L, K]; `x_BLD` is what the layer was given."""
        return F.scaled_dot_product_attention(q_BHLK, k_BHLK, v_BHLK, is_causal=self.causal)


class ConvertedAttention(SelfAttention):
    """A SelfAttention of another core that an existing module can become, in place, and stop being.

    Attributes:
        parts: names of the attributes that a method adds, taken away by `revert`.
    """

    parts: ClassVar[tuple[str, ...]] = ()

    def forward(self, x_BLD: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Return the attention's output, [B, L, D]; the two options are those of timm's callers.

        Raises:
            UsageError: if it is given a mask, or asked to be causal where it is not.
        """
        self.check_mask(attn_mask, is_causal)
        return super().forward(x_BLD)

    def check_mask(self, attn_mask: Tensor | None, is_causal: bool) -> None:
        """Raise a UsageError if there is a mask, or it is asked to be causal where it is not."""
        if attn_mask is not None or (is_causal and not self.causal):
            what = "is_causal=True" if attn_mask is None else "attention mask"
            raise UsageError(f"a converted attention ({type(self).__name__}) takes no {what}: leave it out.")

    def setup(self, *arguments: Any, **options: Any) -> None:
        """Check the options and add the parts: called by `convert`, and by a method's own `__init__`."""

    @classmethod
    def convert(cls, module: nn.Module, **options: Any) -> None:
        """Turn a module that `convertible` recognises into one of these, in place.

        Raises:
            UsageError: if it carries another method's core already, its parameters are sharded, or the options are
                wrong.
        """
        if isinstance(module, ConvertedAttention):
            raise UsageError(f"this attention is a {type(module).__name__} already: remove that first.")
        if is_sharded(module):
            raise UsageError(f"this {type(module).__name__} is sharded already: change it before fully_shard.")
        original = type(module)
        bare = not issubclass(original, SelfAttention)
        if bare:
            module.causal = False  # type: ignore[assignment]  # timm's Attention sees everything
        module.__class__ = cls
        try:
            module.setup(**options)  # type: ignore[operator]
        except UsageError:
            module.__class__ = original
            if bare:
                del module.causal
            raise
        for name in cls.parts:
            if isinstance(part := getattr(module, name), nn.Module):
                part.train(module.training)
        module._original = original  # type: ignore[assignment]

    def revert(self) -> None:
        """Turn this module back into what it was, in place.

        Raises:
            UsageError: if it was built as it is.
        """
        original = self.__dict__.pop("_original", None)
        if original is None:
            raise UsageError(f"this {type(self).__name__} was built as one: there is nothing to turn it back into.")
        for name in self.parts:
            delattr(self, name)
        if not issubclass(original, SelfAttention):
            del self.causal
        self.__class__ = original


def convertible(model: nn.Module) -> dict[str, nn.Module]:
    """Return the attention modules of a model that `ConvertedAttention.convert` takes, by name, in order."""
    return {name: module for name, module in model.named_modules() if _is_convertible(module)}


def attentions(model: nn.Module, method: str) -> dict[str, nn.Module]:
    """Return what `convertible` does, for a method to change.

    Args:
        model: the model.
        method: name of the method, for error messages.

    Raises:
        UsageError: if there is none, or one is sharded already.
    """
    found = convertible(model)
    if not found:
        for name, module in model.named_modules():
            if isinstance(module, ConvertedAttention):
                raise UsageError(f"{method}: {name!r} is a {type(module).__name__} already: remove that first.")
        raise UsageError(f"{method}: no attention to change in {type(model).__name__}. Looked for {LOOKED_FOR}.")
    check_unsharded(found, method)
    return found


def check_unsharded(modules: Mapping[str, nn.Module], method: str) -> None:
    """Raise a UsageError if the parameters of one of the modules are sharded: new ones beside them would not be."""
    for name, module in modules.items():
        if is_sharded(module):
            raise UsageError(f"{method}: {name!r} is sharded already: apply it before fully_shard.")


def converted(model: nn.Module, kind: type[ConvertedAttention]) -> dict[str, ConvertedAttention]:
    """Return the modules of a model that became a `kind`, by name, in order."""
    return {
        name: module
        for name, module in model.named_modules()
        if type(module) is kind and "_original" in module.__dict__
    }


def revert_all(model: nn.Module, kind: type[ConvertedAttention], what: str) -> dict[str, str]:
    """Turn the modules of a model that became a `kind` back, in place, and say `what` each is then."""
    found = converted(model, kind)
    for module in found.values():
        module.revert()
    return dict.fromkeys(found, what)


def _is_convertible(module: nn.Module) -> bool:
    if isinstance(module, ConvertedAttention):
        return False
    kind = type(module)
    if isinstance(module, SelfAttention):
        return (type(module).forward, type(module).attend) == (SelfAttention.forward, SelfAttention.attend)
    if f"{kind.__module__}.{kind.__qualname__}" not in _TIMM:
        return False
    # Dropout inside the core, a norm behind it and a gate on it have no place in ours.
    plain = all(_does_nothing(getattr(module, name, None)) for name in ("attn_drop", "proj_drop", "norm", "gate"))
    return plain and all(hasattr(module, name) for name in ("qkv", "proj", "q_norm", "k_norm", "num_heads", "head_dim"))


def _does_nothing(module: nn.Module | None) -> bool:
    return module is None or isinstance(module, nn.Identity) or (isinstance(module, nn.Dropout) and module.p == 0)
