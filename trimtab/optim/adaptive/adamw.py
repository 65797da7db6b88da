"""AdamW: Adam's moments with bias correction, and weight decay apart from the gradient.

    m <- beta1 m + (1 - beta1) g,    v <- beta2 v + (1 - beta2) g^2
    u = (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps),    p <- p - lr (u + weight_decay p)

Kingma and Ba 2015 (arXiv:1412.6980); Loshchilov and Hutter 2019 (arXiv:1711.05101).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from trimtab.card import Card, Default, Paper
from trimtab.optim._ops import addcmul_, ema_
from trimtab.optim.chain import Chain
from trimtab.optim.transform import Transform, check_betas, check_range

__all__ = ["AdamW", "adam"]


class adam(Transform):
    """Adam's step: m_hat / (sqrt(v_hat) + eps), entry by entry.

    Args:
        betas: decay of the two moments, each in [0, 1).
        eps: added to the denominator, above or equal to 0.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> weight.grad = torch.tensor([0.5, -2.0])
        >>> Chain([weight], [adam()], lr=0.1).step()
        >>> [round(value, 4) for value in weight.tolist()]
        [-0.1, 0.1]
    """

    moments = {"exp_avg": True, "exp_avg_sq": False}

    def __init__(self, *, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8) -> None:
        super().__init__(betas=betas, eps=eps)

    def check(self, group: Mapping[str, Any]) -> None:
        """Refuse betas outside [0, 1) and a negative eps."""
        check_betas(group["betas"])
        check_range("eps", group["eps"], 0)

    def init(self, p: Tensor, group: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return both moments, zero."""
        return {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}

    def coefficients(self, step: int, group: Mapping[str, Any]) -> dict[str, Any]:
        """Return rates, the bias corrections and eps."""
        beta1, beta2 = group["betas"]
        return {
            "rate1": 1 - float(beta1),
            "rate2": 1 - float(beta2),
            "beta2": float(beta2),
            "correction1": 1 / (1 - float(beta1) ** step),
            "correction2": 1 / math.sqrt(1 - float(beta2) ** step),
            "eps": float(group["eps"]),
        }

    def update(self, u: Any, p: Any, state: Any, h: Any) -> Any:
        """Return m_hat / (sqrt(v_hat) + eps)."""
        m, v = state["exp_avg"], state["exp_avg_sq"]
        ema_(m, u, h["rate1"])
        addcmul_(v.mul_(h["beta2"]), u, u, h["rate2"])
        return (m * h["correction1"]).div_(v.sqrt().mul_(h["correction2"]).add_(h["eps"]))


class AdamW(Chain):
    """AdamW: u = m_hat / (sqrt(v_hat) + eps), p <- p - lr (u + weight_decay p).

    Args:
        params: parameters or groups.
        lr: learning rate.
        betas: decay of the two moments, each in [0, 1).
        eps: added to the denominator, above or equal to 0.
        weight_decay: decoupled.
        options: of every `Chain`: `maximize`, `state`, `foreach`, `compile`, `nonfinite`.

    Raises:
        UsageError: if an option breaks its rule.

    Example:
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)

    References:
        Loshchilov and Hutter 2019, arXiv:1711.05101.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        **options: Any,
    ) -> None:
        super().__init__(params, [adam(betas=betas, eps=eps)], lr=lr, weight_decay=weight_decay, **options)


CARD = Card(
    name="adamw",
    room="optim",
    summary="Adam with decoupled weight decay",
    paper=Paper("Decoupled Weight Decay Regularization", 2019, arxiv="1711.05101"),
    equation="u = m_hat / (sqrt(v_hat) + eps),  p <- p - lr (u + weight_decay p)",
    claim="Decoupling the decay from the gradient lets learning rate and decay be tuned apart, and generalises better.",
    acts_on="optimizer",
    entry="trimtab.optim.adaptive.adamw:AdamW",
    defaults=(
        Default("lr", 1e-3, "torch.optim.AdamW"),
        Default("betas", (0.9, 0.999), "Adam's paper"),
        Default("eps", 1e-8, "Adam's paper"),
        Default("weight_decay", 0.01, "torch.optim.AdamW"),
    ),
    verified={
        "equation": (
            "tests/optim/adaptive/test_adamw.py::test_first_step_is_closed_form",
            "tests/optim/adaptive/test_adamw.py::test_a_constant_gradient_always_moves_by_the_learning_rate",
        ),
        "reference": ("tests/optim/adaptive/test_adamw.py::test_equals_torch",),
    },
    deviations=(
        "The decay is multiplied by the learning rate, as in torch and in most code since; the paper scales both by a "
        "schedule of its own.",
        "amsgrad is left out.",
    ),
)
