"""One treatment for the matrices of hidden layers, another for every other parameter, as one stage of a chain."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import torch
from torch import Tensor

from trimtab.optim.transform import Transform, check_range

OTHERS = ("embedding", "head", "vector")


def is_matrix(p: Tensor, group: Mapping[str, Any]) -> bool:
    """Whether a parameter is treated as a matrix: two or more dimensions, and no role that says otherwise."""
    return p.ndim >= 2 and p.numel() > 0 and group.get("role") not in OTHERS


def as_matrix(u: Any) -> Any:
    """Return a tensor of two or more dimensions as rows by columns, a convolution's kernels as one row for each output.

    Shapes: u [R, ...]; result [R, C].
    """
    return u if u.ndim == 2 else u.reshape(u.shape[0], -1)


class by_role(Transform):
    """Apply one transform to hidden matrices and another to all else, whose learning rate is a multiple.

    Args:
        matrix: for parameters of two or more dimensions whose group has no role, or the role "matrix".
        other: for the rest: embeddings, the head, vectors, scalars.
        other_lr: the rest's learning rate (and decay) as a multiple of the group's, above or equal to 0.
    """

    elementwise = False

    def __init__(self, matrix: Transform, other: Transform, *, other_lr: float = 1.0) -> None:
        super().__init__(**matrix.options, **other.options, other_lr=other_lr)
        self.matrix, self.other = matrix, other
        self.moments = {**matrix.moments, **other.moments}

    def check(self, group: Mapping[str, Any]) -> None:
        """Check the options of both, and refuse a negative multiple."""
        self.matrix.check(group)
        self.other.check(group)
        check_range("other_lr", group["other_lr"], 0)

    def _for(self, p: Tensor, group: Mapping[str, Any]) -> Transform:
        return self.matrix if is_matrix(p, group) else self.other

    def kind(self, p: Tensor, group: Mapping[str, Any]) -> Hashable:
        """Return which of the two applies, and that one's own kind."""
        return ("matrix" if is_matrix(p, group) else "other", self._for(p, group).kind(p, group))

    def init(self, p: Tensor, group: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the state of the one that applies."""
        return self._for(p, group).init(p, group)

    def coefficients(self, step: int, group: Mapping[str, Any]) -> dict[str, Any]:
        """Return those of both, and what makes the rest's learning rate and decay a multiple."""
        ratio, decay = float(group["other_lr"]), float(group["weight_decay"])
        return {
            "matrix": self.matrix.coefficients(step, group),
            "other": self.other.coefficients(step, group),
            "ratio": ratio,
            "decay": (ratio - 1) * decay,
            "decays": ratio != 1 and bool(decay),
        }

    def due(self, step: int, group: Mapping[str, Any]) -> bool:
        """Whether either has a boundary at this step."""
        return self.matrix.due(step, group) or self.other.due(step, group)

    def refresh(
        self,
        u: Tensor,
        p: Tensor,
        state: dict[str, Tensor],
        step: int,
        group: Mapping[str, Any],
        generator: torch.Generator,
    ) -> None:
        """Refresh the one that applies, if it is due."""
        chosen = self._for(p, group)
        if chosen.due(step, group):
            chosen.refresh(u, p, state, step, group, generator)

    def update(self, u: Any, p: Any, state: Any, h: Any) -> Any:
        """Return the update of the one that applies."""
        role, kind = h["kind"]
        if role == "matrix":
            return self.matrix.update(u, p, state, h["matrix"] | {"kind": kind})
        u = self.other.update(u, p, state, h["other"] | {"kind": kind}) * h["ratio"]
        # The chain adds weight_decay p: what is added here makes that ratio weight_decay p.
        return u + p * h["decay"] if h["decays"] else u
