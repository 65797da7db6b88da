"""Find where a model computes the queries and keys of its attention, in the shapes that models come in."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

PROJECTIONS: tuple[tuple[str, str], ...] = (
    ("q_proj", "k_proj"),
    ("query", "key"),
    ("to_q", "to_k"),
    ("q_lin", "k_lin"),
    ("wq", "wk"),
)
"""Attribute names of separate query and key projections."""

FUSED: tuple[str, ...] = ("qkv", "c_attn")
"""Attribute names of projections whose output is queries, keys and values side by side, [..., 3 * H * K]."""

_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads")
_HEAD_DIM = ("head_dim", "attention_head_size", "dim_head")
_NORMS = (
    "q_norm",
    "k_norm",
    "q_layernorm",
    "k_layernorm",
    "query_norm",
    "key_norm",
    "norm_q",
    "norm_k",
    "q_ln",
    "k_ln",
)

LOOKED_FOR = (
    "nn.MultiheadAttention; q_norm and k_norm slots that are nn.Identity; projections named "
    + ", ".join("/".join(pair) for pair in PROJECTIONS)
    + f" or a fused {' or '.join(FUSED)}, in a module with {', '.join(_HEADS[:4])} or {' or '.join(_HEAD_DIM[:2])}"
)
"""What `attention_sites` recognises, in words for an error message."""

Kind = Literal["slots", "projections", "fused", "multihead"]


@dataclass(frozen=True)
class Site:
    """One attention module and how its queries and keys can be reached.

    Args:
        name: the module's name in the model.
        module: the attention module.
        kind: `"slots"` (query and key name two nn.Identity), `"projections"` (they name two projections), `"fused"`
            (both name one projection of queries, keys and values) or `"multihead"` (nn.MultiheadAttention).
        query: attribute that holds the slot or projection of the queries; empty for `"multihead"`.
        key: the same for the keys.
        head_dim: K, width of one head.
        like: a parameter whose device and dtype a new norm takes.
    """

    name: str
    module: nn.Module
    kind: Kind
    query: str
    key: str
    head_dim: int
    like: Tensor


def attention_sites(model: nn.Module) -> list[Site]:
    """Return the attention modules of a model whose queries and keys are not normalised yet, in order."""
    found = (_site(name, module) for name, module in model.named_modules())
    return [site for site in found if site is not None]


def has_normalized_attention(model: nn.Module) -> bool:
    """Return whether some module of the model already has a query or key norm."""
    return any(_is_normalized(module) for module in model.modules())


def _site(name: str, module: nn.Module) -> Site | None:
    like = next(module.parameters(), None)
    if like is None or _is_normalized(module):
        return None
    if isinstance(module, nn.MultiheadAttention):
        # A subclass with a forward of its own computes something that a replaced forward would not.
        if type(module).forward is not nn.MultiheadAttention.forward:
            return None
        return Site(name, module, "multihead", "", "", module.head_dim, like)
    if isinstance(getattr(module, "q_norm", None), nn.Identity) and isinstance(
        getattr(module, "k_norm", None), nn.Identity
    ):
        head_dim = _head_dim(module, _query_width(module))
        return Site(name, module, "slots", "q_norm", "k_norm", head_dim, like) if head_dim else None
    for query, key in PROJECTIONS:
        width, key_width = _width(module, query), _width(module, key)
        head_dim = _head_dim(module, width)
        # Grouped-query attention has fewer key heads: the key width is then a smaller multiple of the head's.
        if width and key_width and head_dim and key_width % head_dim == 0:
            return Site(name, module, "projections", query, key, head_dim, _weight(module, query))
    for fused in FUSED:
        width = _width(module, fused)
        # GPTBigCode calls its interleaved or multi-query projection c_attn too.
        if not width or width % 3 or hasattr(module, "multi_query"):
            continue
        head_dim = _head_dim(module, width // 3)
        if head_dim:
            return Site(name, module, "fused", fused, fused, head_dim, _weight(module, fused))
    return None


def _is_normalized(module: nn.Module) -> bool:
    parts = [getattr(module, name, None) for name in _NORMS]
    if any(isinstance(part, nn.Module) and not isinstance(part, nn.Identity) for part in parts):
        return True
    projections = [getattr(module, name, None) for pair in (*PROJECTIONS, FUSED) for name in pair]
    return any(isinstance(part, nn.Module) and "qk_norm" in part._modules for part in projections)


def _query_width(module: nn.Module) -> int:
    widths = [_width(module, query) for query, _ in PROJECTIONS] + [_width(module, name) // 3 for name in FUSED]
    return next((width for width in widths if width), 0)


def _width(module: nn.Module, name: str) -> int:
    """Return the output width of a projection that is called as a module, or 0."""
    projection = getattr(module, name, None)
    if not isinstance(projection, nn.Module) or _used_without_call(module, name):
        return 0
    width = getattr(projection, "out_features", None) or getattr(projection, "nf", 0)
    return width if isinstance(width, int) else 0


def _weight(module: nn.Module, name: str) -> Tensor:
    return next(getattr(module, name).parameters())


def _used_without_call(module: nn.Module, name: str) -> bool:
    """Return whether the class hands `name.weight` to F.linear: hooks on the projection would then never run."""
    for kind in type(module).__mro__:
        if kind in (nn.Module, object):
            continue
        try:
            source = inspect.getsource(kind)
        except (OSError, TypeError):
            continue
        if re.search(rf"linear\([^)]*\b{name}\.weight\b", source):
            return True
    return False


def _head_dim(module: nn.Module, width: int) -> int:
    """Return the width of a head, from its own attribute or the number of heads, or 0 where neither fits."""
    holders = [module, getattr(module, "config", None)]
    for holder in holders:
        for name in _HEAD_DIM:
            value = getattr(holder, name, None)
            if isinstance(value, int) and value > 0 and width % value == 0:
                return value
        for name in _HEADS:
            heads = getattr(holder, name, None)
            if isinstance(heads, int) and heads > 0 and width and width % heads == 0:
                return width // heads
    return 0
