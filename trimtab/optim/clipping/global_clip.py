"""Clipping by the global norm: all gradients are scaled together, so that their joint norm has a bound.

    u = g min(1, max_norm / |g|),    |g| the norm over all parameters

Pascanu, Mikolov and Bengio 2013 (arXiv:1211.5063), algorithm 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from trimtab.card import Card, Default, Paper
from trimtab.optim.transform import Transform, check_range

__all__ = ["clip_by_global_norm"]


class clip_by_global_norm(Transform):
    """Scales the updates of all parameters so that their joint norm is at most `max_norm`; keeps `p.grad` as it is.

    Args:
        max_norm: above 0; each parameter group is scaled to its own.

    Example:
        >>> from trimtab.optim import Chain
        >>> weight, bias = torch.nn.Parameter(torch.zeros(1)), torch.nn.Parameter(torch.zeros(1))
        >>> weight.grad, bias.grad = torch.tensor([3.0]), torch.tensor([4.0])
        >>> Chain([weight, bias], [clip_by_global_norm(max_norm=1.0)], lr=1.0).step()
        >>> weight.item(), bias.item()
        (-0.6..., -0.8...)
    """

    elementwise = True
    sums = True

    def __init__(self, *, max_norm: float = 1.0) -> None:
        super().__init__(max_norm=max_norm)

    def check(self, group: Mapping[str, Any]) -> None:
        """Refuse a max_norm that is not above 0."""
        check_range("max_norm", group["max_norm"], 0, open_low=True)

    def coefficients(self, step: int, group: Mapping[str, Any]) -> dict[str, Any]:
        """Return the bound."""
        return {"max_norm": float(group["max_norm"])}

    def total(self, u: Any, p: Any, state: Any, h: Any) -> Any:
        """Return the squared norm of one parameter's update."""
        return (u * u).sum()

    def update(self, u: Any, p: Any, state: Any, h: Any) -> Any:
        """Return the update, scaled."""
        smallest = torch.finfo(h["total"].dtype).tiny
        return u * torch.clamp_max(h["max_norm"] / torch.clamp_min(h["total"].sqrt(), smallest), 1.0)


CARD = Card(
    name="global-clip",
    room="optim",
    summary="all gradients scaled together to a bounded joint norm, as a stage of a chain",
    paper=Paper("On the difficulty of training recurrent neural networks", 2013, arxiv="1211.5063"),
    equation="u = g min(1, max_norm / |g|)",
    claim="Prevents exploding gradients from throwing the weights far away.",
    acts_on="optimizer",
    entry="trimtab.optim.clipping.global_clip:clip_by_global_norm",
    treats={"exploding-gradient": 2, "gradient-spike": 2},
    defaults=(Default("max_norm", 1.0, "ours: what most recipes of language models take"),),
    verified={
        "equation": ("tests/optim/clipping/test_global_clip.py::test_bounds_the_joint_norm",),
        "reference": ("tests/optim/clipping/test_global_clip.py::test_equals_torch",),
    },
    deviations=(
        "torch.nn.utils.clip_grad_norm_ adds 1e-6 to the norm and overwrites p.grad; here nothing is added, and p.grad "
        "stays.",
    ),
)
