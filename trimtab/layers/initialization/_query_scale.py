"""Scale the queries of a model's attention, wherever they can be reached, without changing what a user's class does.

Where queries come out of a module (a projection, a fused projection or a norm), a forward hook scales its output: a
hook, unlike another class, composes with parametrizations, LoRA and FSDP. nn.MultiheadAttention has no such place and
gets one from `QKNormMultiheadAttention`, with norms that do nothing.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.errors import UsageError
from trimtab.layers._attention_sites import FUSED, LOOKED_FOR, PROJECTIONS, _head_dim, _query_width, _width
from trimtab.layers._multihead import QKNormMultiheadAttention

_QUERY_NORMS = ("q_norm", "q_layernorm", "query_norm", "norm_q", "q_ln")


@dataclass(frozen=True)
class QuerySite:
    """Where one attention's queries are.

    Attributes:
        name: the attention module's name.
        module: the module whose output is scaled, or nn.MultiheadAttention.
        fused: whether only the first third of that output are queries.
        scale: sqrt(base head width / head width).
        weights: the parameters that make the queries, each with its number of rows that do (0 for all).
    """

    name: str
    module: nn.Module
    fused: bool
    scale: float
    weights: tuple[tuple[Tensor, int], ...]


def query_sites(model: nn.Module, base: nn.Module, named: Mapping[str, int]) -> list[QuerySite]:
    """Return every attention of a model with the scale of its queries.

    Args:
        model: the model.
        base: the base model.
        named: modules whose whole output are queries, with their number of heads, for attention that has other names.

    Raises:
        UsageError: if a named module does not exist, or some attention is not recognised and none is named.
    """
    bases = dict(base.named_modules())
    sites: list[QuerySite] = []
    modules = dict(model.named_modules())
    for name, heads in named.items():
        widths = [_width(part, name.rpartition(".")[2]) for part in (_parent(modules, name), _parent(bases, name))]
        if not all(widths) or heads < 1 or any(width % heads for width in widths):
            raise UsageError(f"mup: queries names {name!r} with {heads} heads, which is no projection of that many.")
        sites.append(QuerySite(name, modules[name], False, math.sqrt(widths[1] / widths[0]), _rows(modules[name], 0)))
    for name, module in modules.items():
        if name not in bases or type(module) is nn.Identity:
            continue
        dims = [_dim(part) for part in (module, bases[name])]
        if all(dims):
            sites.append(_site(name, module, math.sqrt(dims[1] / dims[0])))
        elif not named and _attends(module):
            raise UsageError(
                f"mup: the queries of {name or type(module).__name__!r} are not found: name their projection in "
                f"queries={{NAME: HEADS}}, or scale them yourself and pass attention=False. Looked for {LOOKED_FOR}."
            )
    return sites


def scale_queries(model: nn.Module, site: QuerySite) -> None:
    """Multiply the queries of one attention by its scale from now on."""
    module = site.module
    if type(module) is nn.MultiheadAttention:
        QKNormMultiheadAttention.convert(module, nn.Identity(), nn.Identity())
        for part in model.modules():
            # Its nested-tensor path, chosen when it was built, relies on the fused inference path of its layers.
            if isinstance(part, nn.TransformerEncoder) and any(one is module for one in part.modules()):
                part.use_nested_tensor = False
    if isinstance(module, QKNormMultiheadAttention):
        module = module.q_norm
    module.mup_query_scale = site.scale  # type: ignore[assignment]
    module.register_forward_hook(_scale_first_third if site.fused else _scale_output)


@torch.no_grad()
def zero_queries(site: QuerySite) -> None:
    """Set what makes the queries to 0."""
    for weight, rows in site.weights:
        weight[: rows or None].zero_()


def _scale_output(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output * module.mup_query_scale  # type: ignore[operator]


def _scale_first_third(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    q, k, v = output.chunk(3, dim=-1)
    return torch.cat([_scale_output(module, args, q), k, v], dim=-1)


def _dim(module: nn.Module) -> int:
    """Return the width of a head, or 0 for what is no attention."""
    if isinstance(module, nn.MultiheadAttention):
        return module.head_dim if type(module) in (nn.MultiheadAttention, QKNormMultiheadAttention) else 0
    if hasattr(module, "multi_query"):  # GPTBigCode calls its interleaved or multi-query projection c_attn too
        return 0
    return _head_dim(module, width) if (width := _query_width(module)) else 0


def _site(name: str, module: nn.Module, scale: float) -> QuerySite:
    if isinstance(module, nn.MultiheadAttention):
        rows = module.embed_dim
        parts = [(module.in_proj_weight, rows), (module.q_proj_weight, 0), (module.in_proj_bias, rows)]
        return QuerySite(name, module, False, scale, tuple((part, n) for part, n in parts if part is not None))
    query = next((query for query, _ in PROJECTIONS if _width(module, query)), "")
    fused = "" if query else next(fused for fused in FUSED if _width(module, fused))
    projection = getattr(module, query or fused)
    rows = _width(module, fused) // 3 if fused else 0
    weights = _rows(projection, rows)
    for slot in _QUERY_NORMS:
        if isinstance(norm := getattr(module, slot, None), nn.Module):
            return QuerySite(name, norm, False, scale, weights)
    return QuerySite(name, projection, bool(fused), scale, weights)


def _rows(projection: nn.Module, rows: int) -> tuple[tuple[Tensor, int], ...]:
    parts = [projection._parameters.get(name) for name in ("weight", "bias")]
    # The rows of a transposed weight are its columns; its transpose is a view of it.
    turned = hasattr(projection, "nf")
    return tuple((part.t() if turned and part.ndim == 2 else part, rows) for part in parts if part is not None)


def _parent(modules: Mapping[str, nn.Module], name: str) -> nn.Module:
    if name not in modules:
        raise UsageError(f"mup: queries names {name!r}, which is not a module of the model and its base.")
    return modules[name.rpartition(".")[0]]


def _attends(module: nn.Module) -> bool:
    """Return whether a module's own code calls scaled_dot_product_attention."""
    if isinstance(module, nn.MultiheadAttention):
        return True
    if type(module).__module__.startswith("torch."):
        return False
    try:
        return "scaled_dot_product_attention(" in inspect.getsource(type(module).forward)
    except (OSError, TypeError, AttributeError):
        return False
