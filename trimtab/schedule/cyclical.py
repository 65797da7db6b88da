"""Cyclical learning rate: a triangle between two rates, again and again.

    x = |t / s - 2 floor(1 + t / (2 s)) + 1|,   factor = low + (1 - low) max(0, 1 - x)     (triangular)
    triangular2 halves the height each cycle; exp_range multiplies it by gamma^t

Smith 2017 (arXiv:1506.01186), section 3.
"""

from __future__ import annotations

import math

from trimtab.card import Card, Default, Paper
from trimtab.errors import UsageError, choose
from trimtab.schedule._shape import Shape, fraction, whole

__all__ = ["cyclic"]

_POLICIES = ("triangular", "triangular2", "exp_range")


def cyclic(step_size: int = 2000, *, low: float = 0.25, policy: str = "triangular", gamma: float = 0.9999) -> Shape:
    """Return a triangle between `low` and 1.

    Args:
        step_size: steps of half a cycle, at least 1.
        low: smallest factor, in [0, 1].
        policy: "triangular", "triangular2" (half the height each cycle) or "exp_range" (height times gamma^t).
        gamma: of "exp_range", in (0, 1].

    Returns:
        The schedule; it has no end.

    Raises:
        UsageError: if an argument breaks its rule.

    Example:
        >>> schedule = cyclic(2, low=0.5)
        >>> [schedule(step) for step in range(5)]
        [0.5, 0.75, 1.0, 0.75, 0.5]

    References:
        Smith 2017, arXiv:1506.01186.
    """
    whole("step_size", step_size, 1)
    fraction("low", low)
    choose("policy", policy, _POLICIES)
    if not fraction("gamma", gamma) > 0:
        raise UsageError(f"gamma must be in (0, 1], got {gamma!r}.")

    def factor(step: int) -> float:
        cycle = math.floor(1 + step / (2 * step_size))
        height = max(0.0, 1 - abs(step / step_size - 2 * cycle + 1))
        if policy == "triangular2":
            height /= 2.0 ** (cycle - 1)
        elif policy == "exp_range":
            height *= gamma**step
        return low + (1 - low) * height

    return Shape("cyclic", factor, None, (("step_size", step_size), ("low", low), ("policy", policy), ("gamma", gamma)))


CARD = Card(
    name="cyclic",
    room="schedule",
    summary="a learning rate that rises and falls between two values again and again",
    paper=Paper("Cyclical Learning Rates for Training Neural Networks", 2017, arxiv="1506.01186"),
    equation="factor = low + (1 - low) max(0, 1 - |t / s - 2 floor(1 + t / (2 s)) + 1|)",
    claim="Reaches the accuracy of a tuned rate without tuning, often in fewer steps.",
    acts_on="settings",
    entry="trimtab.schedule.cyclical:cyclic",
    defaults=(
        Default("step_size", 2000, "paper: 2 to 10 times the steps of an epoch; 2,000 on CIFAR-10"),
        Default("low", 0.25, "paper: a third or a fourth of the largest rate"),
        Default("policy", "triangular", "paper"),
        Default("gamma", 0.9999, "paper: 0.99994 on CIFAR-10"),
    ),
    verified={
        "reference": ("tests/schedule/test_open_ended.py::test_cyclic_equals_torchs",),
        "equation": ("tests/schedule/test_open_ended.py::test_cyclic_is_a_triangle",),
    },
)
