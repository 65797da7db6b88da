"""Adaptive gradient clipping (AGC): each unit's gradient is bounded by a fraction of the norm of its weights.

For each unit i (a row of a matrix, an output channel of a convolution, a whole vector), with |W_i|* = max(|W_i|, eps),

    G_i <- lambda (|W_i|* / |G_i|) G_i    where |G_i| / |W_i|* > lambda

Brock et al. 2021 (arXiv:2102.06171), equation 3; authors' code deepmind/deepmind-research, nfnets/optim.py.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import torch
from torch import Tensor

from trimtab.card import Card, Default, Paper
from trimtab.optim.transform import Transform, check_range

__all__ = ["adaptive_clip", "unitwise_norm"]

_SMALLEST = 1e-6


def unitwise_norm(x: Any) -> Any:
    """Return the norm of each unit: over all but the first dimension, or of a whole vector or scalar.

    Shapes: [O, ...] gives [O, 1, ...]; a vector or a scalar gives a scalar.

    Example:
        >>> unitwise_norm(torch.tensor([[3.0, 4.0], [0.0, 1.0]])).tolist()
        [[5.0], [1.0]]
    """
    dims = tuple(range(1, x.ndim)) if x.ndim > 1 else None
    return torch.linalg.vector_norm(x, dim=dims, keepdim=x.ndim > 1)


class adaptive_clip(Transform):
    """Clips each unit's gradient to `clip_factor` times the norm of its weights.

    Parameters of a group with role "head" pass through: the paper leaves out the last linear layer.

    Args:
        clip_factor: lambda, above 0; the paper's best values are 0.01 at batch size 4096 and larger at smaller ones.
        clip_eps: least norm that weights count with, above 0, so that weights of 0 can move.

    Example:
        >>> from trimtab.optim import Chain
        >>> weight = torch.nn.Parameter(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
        >>> weight.grad = torch.ones(2, 2)
        >>> Chain([weight], [adaptive_clip(clip_factor=0.1)], lr=1.0).step()
        >>> (torch.tensor([3.0, 4.0]) - weight[0]).norm().round(decimals=4).tolist()  # a tenth of 5
        0.5
    """

    elementwise = False

    def __init__(self, *, clip_factor: float = 0.01, clip_eps: float = 1e-3) -> None:
        super().__init__(clip_factor=clip_factor, clip_eps=clip_eps)

    def check(self, group: Mapping[str, Any]) -> None:
        """Refuse a factor or an eps that is not above 0."""
        check_range("clip_factor", group["clip_factor"], 0, open_low=True)
        check_range("clip_eps", group["clip_eps"], 0, open_low=True)

    def kind(self, p: Tensor, group: Mapping[str, Any]) -> Hashable:
        """Return whether the parameter's gradient is clipped."""
        return group.get("role") != "head"

    def coefficients(self, step: int, group: Mapping[str, Any]) -> dict[str, Any]:
        """Return the factor and the least norm."""
        return {"factor": float(group["clip_factor"]), "clip_eps": float(group["clip_eps"])}

    def update(self, u: Any, p: Any, state: Any, h: Any) -> Any:
        """Return the clipped gradient."""
        if not h["kind"]:
            return u
        norm = unitwise_norm(u)
        most = torch.clamp_min(unitwise_norm(p), h["clip_eps"]) * h["factor"]
        return u * torch.clamp_max(most / torch.clamp_min(norm, _SMALLEST), 1.0)


CARD = Card(
    name="adaptive-clipping",
    room="optim",
    summary="gradients clipped unit by unit, relative to the norm of the weights",
    paper=Paper(
        "High-Performance Large-Scale Image Recognition Without Normalization",
        2021,
        arxiv="2102.06171",
        code="https://github.com/deepmind/deepmind-research/tree/master/nfnets",
    ),
    equation="G_i <- lambda (|W_i|* / |G_i|) G_i where |G_i| > lambda |W_i|*,  |W_i|* = max(|W_i|, eps)",
    claim="Lets networks without normalisation train at large batch sizes and learning rates.",
    acts_on="optimizer",
    entry="trimtab.optim.clipping.adaptive_clipping:adaptive_clip",
    treats={"gradient-spike": 3, "exploding-gradient": 3},
    defaults=(
        Default("clip_factor", 0.01, "paper, section 4.1 (recalled); timm"),
        Default("clip_eps", 1e-3, "paper, section 4.1"),
    ),
    verified={
        "equation": ("tests/optim/clipping/test_adaptive_clipping.py::test_equals_the_papers_loop",),
        "reference": ("tests/optim/clipping/test_adaptive_clipping.py::test_equals_timm",),
        "claim": ("tests/claims/test_optimizers_clipping.py::test_adaptive_clipping_survives_a_spike",),
    },
    deviations=(
        "The gradient's norm counts with at least 1e-6 in the quotient, as in the authors' code.",
        "Weights of any dimension have their outputs first, as torch's layers have; a transposed convolution's units "
        "are its inputs, then.",
    ),
)
