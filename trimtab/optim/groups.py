"""Parameter groups by role: matrices, vectors, embeddings and the head, with weight decay where it does good.

Decay acts on matrices and the head; biases, gains of norms and other vectors have none, as in every well-tuned recipe,
and embeddings have none because a row that no batch touches would only shrink (OLMo 2, arXiv:2501.00656, section 3.3).
"""

from __future__ import annotations

from typing import Any

from torch import nn

from trimtab.errors import UsageError

__all__ = ["param_groups_for"]

ROLES = ("matrix", "head", "embedding", "vector")


def param_groups_for(
    model: nn.Module,
    *,
    weight_decay: float = 0.1,
    decayed: tuple[str, ...] = ("matrix", "head"),
    head: str | None = None,
) -> list[dict[str, Any]]:
    """Return a model's trainable parameters as groups by role, each with its weight decay.

    A role is "embedding" for weights of `nn.Embedding` (and what is tied to them), "head" for the weight of the output
    layer, "vector" for what has fewer than two dimensions, and "matrix" for the rest. Optimizers for matrices (Muon,
    GaLore) read the role; any optimizer takes the groups.

    Args:
        model: any module; frozen parameters are left out.
        weight_decay: of the decayed roles; 0 for the others.
        decayed: roles with weight decay.
        head: name of the output layer's module; default what the model's `get_output_embeddings()` returns, or else
            its last `nn.Linear`, which is right for classifiers and language models alike.

    Returns:
        Groups with `params` (pairs of name and parameter), `role` and `weight_decay`; empty ones are left out.

    Raises:
        UsageError: if a role or the head's name does not exist, or there is nothing to train.

    Example:
        >>> model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 10))
        >>> {group["role"]: [name for name, _ in group["params"]] for group in param_groups_for(model)}
        {'matrix': ['1.weight'], 'head': ['3.weight'], 'embedding': ['0.weight'], 'vector': ['1.bias', ...]}
    """
    if unknown := [role for role in decayed if role not in ROLES]:
        raise UsageError(f"decayed has {unknown[0]!r}, which is not a role: valid are {', '.join(ROLES)}.")
    embeddings = {
        id(module.weight) for module in model.modules() if isinstance(module, (nn.Embedding, nn.EmbeddingBag))
    }
    output = _head(model, head)
    parts: dict[str, list[tuple[str, nn.Parameter]]] = {role: [] for role in ROLES}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        if id(p) in embeddings:
            role = "embedding"
        elif p.ndim < 2:
            role = "vector"
        else:
            role = "head" if id(p) in output else "matrix"
        parts[role].append((name, p))
    groups = [
        {"params": params, "role": role, "weight_decay": weight_decay if role in decayed else 0.0}
        for role, params in parts.items()
        if params
    ]
    if not groups:
        raise UsageError("the model has no trainable parameter: check requires_grad.")
    return groups


def _head(model: nn.Module, name: str | None) -> set[int]:
    """Return the identities of the output layer's parameters."""
    if name is not None:
        found = dict(model.named_modules()).get(name)
        if found is None:
            raise UsageError(f"head {name!r} is not a module of the model.")
        return {id(p) for p in found.parameters()}
    ask = getattr(model, "get_output_embeddings", None)
    layer = ask() if callable(ask) else None
    if layer is None:
        linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
        layer = linears[-1] if linears else None
    return set() if layer is None else {id(p) for p in layer.parameters()}
