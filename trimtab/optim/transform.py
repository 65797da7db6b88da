"""Gradient transforms: the stages of a `Chain`, each from updates to updates."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from numbers import Integral
from typing import Any, ClassVar

import torch
from torch import Tensor

from trimtab.errors import UsageError
from trimtab.optim._ops import add_

__all__ = ["Transform"]

Coefficients = dict[str, Any]
"""What an update needs besides tensors: floats may change at every step, anything else chooses the code that runs."""


class Transform:
    """One stage of a `Chain`: it maps the updates of the parameters to new updates, and may keep state for each.

    A subclass says what it needs and writes its equation once, in `update`. The arguments there are one tensor, a
    `TensorList` of many, or tensors that torch.compile traces: code that uses torch's operations serves all three. It
    never changes `u` or `p`, and changes `state` in place only. The first stage's `u` is the gradient, and the chain
    ends with p <- p - lr (u + weight_decay p).

    Attributes:
        elementwise: whether each entry of the result depends only on the same entry of `u`, `p` and the state, so that
            parameters may be updated in pieces and in shards. Where it is false a sharded parameter is gathered first.
        moments: state tensors that may be kept in few bits, each with whether it has a sign.
        writes: whether `update` writes the new parameter itself and returns None; only the last stage may.
        sums: whether `total` has a number to add up over all parameters before the update.

    Args:
        options: the hyper-parameters with their defaults; they become options of the parameter groups under these
            names, so that every group may have its own and schedulers can change them.

    Example:
        >>> class Sign(Transform):
        ...     def update(self, u: Any, p: Any, state: Any, h: Any) -> Any:
        ...         return torch.sign(u)
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        >>> from trimtab.optim import Chain
        >>> optimizer = Chain([weight], [Sign()], lr=0.5)
        >>> weight.grad = torch.tensor([3.0, -4.0])
        >>> optimizer.step()
        >>> weight.tolist()
        [0.5, 2.5]
    """

    elementwise: ClassVar[bool] = True
    moments: Mapping[str, bool] = {}
    writes: ClassVar[bool] = False
    sums: ClassVar[bool] = False

    def __init__(self, **options: Any) -> None:
        self.options = options

    def check(self, group: Mapping[str, Any]) -> None:
        """Raise a `UsageError` if an option of a parameter group breaks its rule."""

    def kind(self, p: Tensor, group: Mapping[str, Any]) -> Hashable:
        """Return what distinguishes this parameter's treatment (by shape or role), as `h["kind"]` in `update`."""
        return None

    def init(self, p: Tensor, group: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the state of a parameter before its first step, made from its shape only (`zeros_like`, `new_zeros`).

        `p` is in the dtype of computation (float32 or wider). It may be on the device "meta", when shapes are asked.
        """
        return {}

    def coefficients(self, step: int, group: Mapping[str, Any]) -> Coefficients:
        """Return what `update` needs at a step, counted from 1: floats, and anything else that chooses its code.

        All arithmetic on step and options belongs here, in Python's double precision: in a compiled step the floats are
        tensors, so that a new learning rate or step compiles nothing, and every other value compiles its own variant.
        """
        return {}

    def due(self, step: int, group: Mapping[str, Any]) -> bool:
        """Whether `refresh` runs before this step's update."""
        return False

    def refresh(
        self,
        u: Tensor,
        p: Tensor,
        state: dict[str, Tensor],
        step: int,
        group: Mapping[str, Any],
        generator: torch.Generator,
    ) -> None:
        """Change the state in place at a boundary (new projector, reset of moments), one parameter at a time.

        `generator` is seeded by the chain's seed, the parameter's place and the step: the same on every rank and after
        a resume.
        """

    def total(self, u: Any, p: Any, state: Any, h: Any) -> Any:
        """Return one number a parameter; their sum over all parameters is `h["total"]` in `update`. Needs `sums`."""
        raise NotImplementedError

    def update(self, u: Any, p: Any, state: Any, h: Any) -> Any:
        """Return the new update from the incoming one."""
        raise NotImplementedError


def moments_of(transforms: Iterable[Transform]) -> dict[str, bool]:
    """Return the moments of several transforms, each with whether it has a sign."""
    return {name: signed for transform in transforms for name, signed in transform.moments.items()}


def check_range(
    name: str, value: Any, low: float, high: float = float("inf"), *, open_low: bool = False, open_high: bool = True
) -> None:
    """Raise a `UsageError` unless a number lies in a range.

    Args:
        name: of the option, for the message.
        value: a number.
        low: lower end.
        high: upper end.
        open_low: whether the lower end itself is refused.
        open_high: whether the upper end itself is refused.

    Raises:
        UsageError: if it does not.

    Example:
        >>> check_range("lr", 0.1, 0)
        >>> check_range("lr", -1, 0)
        Traceback (most recent call last):
        trimtab.errors.UsageError: lr must be in [0, inf), got -1.
    """
    ends = f"{'(' if open_low else '['}{low:g}, {high:g}{')' if open_high else ']'}"
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    above = number and (value > low if open_low else value >= low)
    if not (above and (value < high if open_high else value <= high)):
        raise UsageError(f"{name} must be in {ends}, got {value!r}.")


def check_whole(name: str, value: Any, low: int | None = None) -> None:
    """Raise a `UsageError` unless a value is a whole number, not below the lower end if there is one.

    Raises:
        UsageError: if it is not.

    Example:
        >>> check_whole("interval", 2.5, 0)
        Traceback (most recent call last):
        trimtab.errors.UsageError: interval must be a whole number, at least 0, got 2.5.
    """
    if not isinstance(value, Integral) or isinstance(value, bool) or (low is not None and value < low):
        raise UsageError(f"{name} must be a whole number{'' if low is None else f', at least {low}'}, got {value!r}.")


def check_flag(name: str, value: Any) -> None:
    """Raise a `UsageError` unless a value is True or False.

    Raises:
        UsageError: if it is not.

    Example:
        >>> check_flag("nesterov", "no")
        Traceback (most recent call last):
        trimtab.errors.UsageError: nesterov must be True or False, got 'no'.
    """
    if not isinstance(value, bool):
        raise UsageError(f"{name} must be True or False, got {value!r}.")


def check_betas(betas: Any, count: int = 2) -> None:
    """Raise a `UsageError` unless `betas` are numbers in [0, 1), as many as there should be.

    Raises:
        UsageError: if they are not.
    """
    if not isinstance(betas, (tuple, list)) or len(betas) != count:
        raise UsageError(f"betas must be {count} numbers in [0, 1), got {betas!r}.")
    for beta in betas:
        check_range("betas", beta, 0, 1)


class Descend(Transform):
    """The chain's end: p <- p - lr (u + weight_decay p), computed as AdamW does, decay first."""

    writes = True

    def coefficients(self, step: int, group: Mapping[str, Any]) -> Coefficients:
        """Return the learning rate, negative, and what is left of the weights."""
        lr = float(group["lr"])
        decay = group["weight_decay"]
        return {"step": -lr, "keep": 1 - lr * decay, "decays": bool(decay)}

    def update(self, u: Any, p: Any, state: Any, h: Any) -> None:
        """Write the new parameters."""
        if h["decays"]:
            p.mul_(h["keep"])
        add_(p, u, h["step"])
