"""Lion: the sign of a momentum, so that every entry moves by the learning rate.

    u = sign(beta1 m + (1 - beta1) g),    m <- beta2 m + (1 - beta2) g,    p <- p - lr (u + weight_decay p)

It keeps one moment where Adam keeps two, and its updates are larger: the paper takes a learning rate 3 to 10 times
smaller than AdamW's, and a weight decay as many times larger.

Chen et al. 2023 (arXiv:2302.06675); authors' code google/automl, lion.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from trimtab.card import Card, Default, Experiment, Paper
from trimtab.optim._ops import ema_
from trimtab.optim.chain import Chain
from trimtab.optim.transform import Transform, check_betas

__all__ = ["Lion", "sign_momentum"]


class sign_momentum(Transform):
    """Lion's step: the sign of a mean of momentum and gradient, entry by entry.

    Args:
        betas: weight of the momentum in the step, and decay of the momentum, each in [0, 1).

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(3))
        >>> weight.grad = torch.tensor([0.5, -2.0, 0.0])
        >>> Chain([weight], [sign_momentum()], lr=0.25).step()
        >>> weight.tolist()
        [-0.25, 0.25, 0.0]
    """

    moments = {"exp_avg": True}

    def __init__(self, *, betas: tuple[float, float] = (0.9, 0.99)) -> None:
        super().__init__(betas=betas)

    def check(self, group: Mapping[str, Any]) -> None:
        """Refuse betas outside [0, 1)."""
        check_betas(group["betas"])

    def init(self, p: Tensor, group: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the momentum, zero."""
        return {"exp_avg": torch.zeros_like(p)}

    def coefficients(self, step: int, group: Mapping[str, Any]) -> dict[str, Any]:
        """Return how much of the gradient goes into the step and into the momentum."""
        beta1, beta2 = group["betas"]
        return {"rate1": 1 - float(beta1), "rate2": 1 - float(beta2)}

    def update(self, u: Any, p: Any, state: Any, h: Any) -> Any:
        """Return the sign of the mean, which is 0 where the mean is."""
        m = state["exp_avg"]
        direction = torch.sign(torch.lerp(m, u, h["rate1"]))
        ema_(m, u, h["rate2"])
        return direction


class Lion(Chain):
    """Lion: u = sign(beta1 m + (1 - beta1) g), p <- p - lr (u + weight_decay p).

    Args:
        params: parameters or groups.
        lr: learning rate, which is how far every entry moves: 3 to 10 times smaller than AdamW's.
        betas: weight of the momentum in the step, and decay of the momentum, each in [0, 1).
        weight_decay: decoupled; 3 to 10 times larger than AdamW's.
        options: of every `Chain`: `maximize`, `state`, `foreach`, `compile`, `nonfinite`.

    Raises:
        UsageError: if an option breaks its rule.

    Example:
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = Lion(model.parameters(), lr=1e-4, weight_decay=0.1)

    References:
        Chen et al. 2023, arXiv:2302.06675; authors' code google/automl, lion/lion_pytorch.py.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        *,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__(params, [sign_momentum(betas=betas)], lr=lr, weight_decay=weight_decay, **options)


CARD = Card(
    name="lion",
    room="optim",
    summary="the sign of a momentum: one moment instead of two",
    paper=Paper(
        "Symbolic Discovery of Optimization Algorithms",
        2023,
        arxiv="2302.06675",
        code="https://github.com/google/automl/tree/master/lion",
    ),
    equation="u = sign(beta1 m + (1 - beta1) g),  m <- beta2 m + (1 - beta2) g,  p <- p - lr (u + weight_decay p)",
    claim="Reaches AdamW's quality with half its state; gains grow with the batch, and a small batch shows none.",
    acts_on="optimizer",
    entry="trimtab.optim.adaptive.lion:Lion",
    defaults=(
        Default("lr", 1e-4, "authors' code"),
        Default("betas", (0.9, 0.99), "paper, algorithm 2"),
        Default("weight_decay", 0.0, "authors' code"),
    ),
    verified={
        "equation": (
            "tests/optim/adaptive/test_lion.py::test_every_entry_moves_by_the_learning_rate",
            "tests/optim/adaptive/test_lion.py::test_equals_the_papers_loop",
        ),
        "reference": ("tests/optim/adaptive/test_lion.py::test_equals_lion_pytorch",),
        "claim": ("tests/claims/test_optimizers_adaptive.py::test_lion_keeps_half_of_adamws_state",),
    },
    experiments=(
        Experiment(
            "lm-small",
            "adamw,lr=0.003,steps=300,batch_size=8",
            "lion,lr=0.001,steps=300,batch_size=8",
            mechanism="state_bytes_per_parameter",
            outcome=(
                "worse: final loss 2.482 to 2.720, difference +0.238 (95 % interval +0.108 to +0.368), n=5; state "
                "8.00 to 4.00 bytes a parameter; learning rates tuned on both sides; weight decay is AdamW's 0.1"
            ),
        ),
    ),
)
