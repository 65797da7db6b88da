"""SGD with momentum, dampening, Nesterov's step and weight decay in the gradient, as torch.optim.SGD has them.

    g <- g + weight_decay p
    b <- momentum b + (1 - dampening) g    (b <- g at the first step)
    u = g + momentum b with nesterov, else b;    p <- p - lr u

Polyak 1964 (heavy ball); Sutskever et al. 2013 for the form of Nesterov's step without a look ahead.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from trimtab.card import Card, Default, Paper
from trimtab.errors import UsageError
from trimtab.optim._ops import add_
from trimtab.optim.chain import Chain
from trimtab.optim.transform import Descend, Transform, check_flag, check_range

__all__ = ["SGD", "momentum"]


class momentum(Transform):
    """A running sum of updates: b <- momentum b + (1 - dampening) u, giving b, or u + momentum b with nesterov.

    Args:
        momentum: what is kept of the sum, in [0, 1); 0 passes updates on and keeps no state.
        dampening: what is taken off the incoming update, in [0, 1]; not at the first step.
        nesterov: whether to look ahead; needs momentum without dampening.

    Raises:
        UsageError: if a parameter gets momentum after it had none at its first step.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(1))
        >>> optimizer = Chain([weight], [momentum(momentum=0.5)], lr=1.0)
        >>> for _ in range(2):
        ...     weight.grad = torch.ones(1)
        ...     optimizer.step()
        >>> weight
        Parameter containing:
        tensor([-2.5000], requires_grad=True)
    """

    moments = {"momentum_buffer": True}

    def __init__(self, *, momentum: float = 0.9, dampening: float = 0.0, nesterov: bool = False) -> None:
        super().__init__(momentum=momentum, dampening=dampening, nesterov=nesterov)

    def check(self, group: Mapping[str, Any]) -> None:
        """Refuse momentum outside [0, 1), dampening outside [0, 1], and nesterov without momentum or dampened."""
        check_range("momentum", group["momentum"], 0, 1)
        check_range("dampening", group["dampening"], 0, 1, open_high=False)
        check_flag("nesterov", group["nesterov"])
        if group["nesterov"] and (group["momentum"] == 0 or group["dampening"] != 0):
            raise UsageError(
                f"nesterov needs momentum above 0 and dampening 0, got {group['momentum']!r} and "
                f"{group['dampening']!r}: pass momentum=0.9, dampening=0."
            )

    def init(self, p: Tensor, group: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the sum, zero, where there is momentum."""
        return {"momentum_buffer": torch.zeros_like(p)} if group["momentum"] else {}

    def coefficients(self, step: int, group: Mapping[str, Any]) -> dict[str, Any]:
        """Return what is kept of the sum and taken of the update."""
        return {
            "keeps": bool(group["momentum"]),
            "nesterov": bool(group["nesterov"]),
            "momentum": float(group["momentum"]),
            "rate": 1.0 if step == 1 else 1.0 - float(group["dampening"]),
        }

    def update(self, u: Any, p: Any, state: Any, h: Any) -> Any:
        """Return the sum, or the update and what momentum will add to it."""
        if not h["keeps"]:
            return u
        if "momentum_buffer" not in state:
            raise UsageError("momentum was 0 at a parameter's first step: build a new optimizer to use momentum.")
        b = state["momentum_buffer"]
        add_(b.mul_(h["momentum"]), u, h["rate"])
        return u + b * h["momentum"] if h["nesterov"] else b


class _Coupled(Transform):
    """Weight decay as a part of the gradient: g + weight_decay p."""

    def coefficients(self, step: int, group: Mapping[str, Any]) -> dict[str, Any]:
        decay = float(group["weight_decay"])
        return {"decays": bool(decay), "decay": decay}

    def update(self, u: Any, p: Any, state: Any, h: Any) -> Any:
        return u + p * h["decay"] if h["decays"] else u


class _Step(Descend):
    """p <- p - lr u: the decay is in u already."""

    def coefficients(self, step: int, group: Mapping[str, Any]) -> dict[str, Any]:
        return super().coefficients(step, {**group, "weight_decay": 0.0})


class SGD(Chain):
    """Stochastic gradient descent: b <- momentum b + (1 - dampening) (g + weight_decay p), p <- p - lr b.

    Args:
        params: parameters or groups.
        lr: learning rate.
        momentum: what is kept of the sum of gradients, in [0, 1).
        dampening: what is taken off the gradient, in [0, 1].
        nesterov: whether to step along g + momentum b.
        weight_decay: added to the gradient as weight_decay p (L2 regularisation), unlike the decoupled decay of the
            other optimizers here.
        options: of every `Chain`: `maximize`, `state`, `foreach`, `compile`, `nonfinite`.

    Raises:
        UsageError: if an option breaks its rule.

    Example:
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)

    References:
        Sutskever et al. 2013, "On the importance of initialization and momentum in deep learning".
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        *,
        momentum: float = 0.0,
        dampening: float = 0.0,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        **options: Any,
    ) -> None:
        sums = _momentum(momentum=momentum, dampening=dampening, nesterov=nesterov)
        super().__init__(params, [_Coupled(), sums, _Step()], lr=lr, weight_decay=weight_decay, **options)


# The constructor has an option of the transform's name.
_momentum = momentum

CARD = Card(
    name="sgd",
    room="optim",
    summary="stochastic gradient descent with momentum",
    paper=Paper(
        "On the importance of initialization and momentum in deep learning",
        2013,
        code="https://proceedings.mlr.press/v28/sutskever13.html",
    ),
    equation="b <- momentum b + (1 - dampening) (g + weight_decay p),  p <- p - lr b",
    claim="With momentum, plain gradient descent trains deep networks that otherwise need second-order methods.",
    acts_on="optimizer",
    entry="trimtab.optim.adaptive.sgd:SGD",
    defaults=(
        Default("lr", 1e-3, "torch.optim.SGD"),
        Default("momentum", 0.0, "torch.optim.SGD"),
        Default("dampening", 0.0, "torch.optim.SGD"),
        Default("nesterov", False, "torch.optim.SGD"),
        Default("weight_decay", 0.0, "torch.optim.SGD"),
    ),
    verified={
        "equation": (
            "tests/optim/adaptive/test_sgd.py::test_momentum_of_a_constant_gradient_is_a_geometric_sum",
            "tests/optim/adaptive/test_sgd.py::test_one_step_is_gradient_descent",
        ),
        "reference": ("tests/optim/adaptive/test_sgd.py::test_equals_torch",),
    },
    deviations=(
        "The paper has no dampening and sums steps, with their learning rates; this is torch.optim.SGD's form, which "
        "sums gradients and differs where the learning rate changes.",
        "weight_decay is in the gradient, as users of SGD expect; every other optimizer here decouples it.",
    ),
)
