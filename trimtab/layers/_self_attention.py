"""Self-attention over one fused projection, with a core that methods replace.

A method that changes what happens between the projections is a subclass with its own `attend`; `convert` makes one of a
module that a model already has, weights and all, and `revert` undoes it.

Shape suffixes: B batch, L length, D width, H heads, K width of a head.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.errors import UsageError

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
        batch, length, _ = x_BLD.shape
        qkv = self.qkv(x_BLD).view(batch, length, 3, self.num_heads, self.head_dim)
        q_BHLK, k_BHLK, v_BHLK = qkv.permute(2, 0, 3, 1, 4)
        y_BHLK = self.attend(self.q_norm(q_BHLK), self.k_norm(k_BHLK), v_BHLK, x_BLD)
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
        if attn_mask is not None or (is_causal and not self.causal):
            what = "is_causal=True" if attn_mask is None else "attention mask"
            raise UsageError(f"a converted attention ({type(self).__name__}) takes no {what}: leave it out.")
        return super().forward(x_BLD)

    def setup(self, *arguments: Any, **options: Any) -> None:
        """Check the options and add the parts: called by `convert`, and by a method's own `__init__`."""

    @classmethod
    def convert(cls, module: nn.Module, **options: Any) -> None:
        """Turn a module that `convertible` recognises into one of these, in place.

        Raises:
            UsageError: if it carries another method's core already, or the options are wrong.
        """
        if isinstance(module, ConvertedAttention):
            raise UsageError(f"this attention is a {type(module).__name__} already: remove that first.")
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


def converted(model: nn.Module, kind: type[ConvertedAttention]) -> dict[str, ConvertedAttention]:
    """Return the modules of a model that became a `kind`, by name, in order."""
    return {
        name: module
        for name, module in model.named_modules()
        if type(module) is kind and "_original" in module.__dict__
    }


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
