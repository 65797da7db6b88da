"""Warm-up, then linear decay to the end.

    factor(t) = (t + 1) / (w + 1)                                 for t < w
    factor(t) = floor + (1 - floor) (1 - (t - w) / (T - w))       for w <= t <= T,  and factor(T) after

Defazio et al. 2023 (arXiv:2310.07831): the schedule that their bound for the last iterate prefers.
"""

from __future__ import annotations

from trimtab.card import Card, Default, Paper
from trimtab.schedule._shape import Shape, decayed

__all__ = ["linear"]


def linear(total: int, *, warmup: int = 0, floor: float = 0.0) -> Shape:
    """Return linear warm-up and linear decay: floor + (1 - floor) (1 - x), x from 0 to 1 after the warm-up.

    Args:
        total: steps until the floor is reached, at least 1.
        warmup: steps of linear warm-up, less than `total`.
        floor: last factor, in [0, 1].

    Returns:
        The schedule.

    Raises:
        UsageError: if an argument breaks its rule.

    Example:
        >>> [linear(4)(step) for step in range(6)]
        [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    """
    return decayed("linear", total, warmup, floor)


CARD = Card(
    name="linear",
    room="schedule",
    summary="linear warm-up, then linear decay to the end",
    paper=Paper("Optimal Linear Decay Learning Rate Schedules and Further Refinements", 2023, arxiv="2310.07831"),
    equation="factor = floor + (1 - floor) (1 - (t - w) / (T - w))",
    claim="Linear decay to zero matches or beats other common schedules, cosine among them, over most problems.",
    acts_on="settings",
    entry="trimtab.schedule.linear_decay:linear",
    defaults=(
        Default("warmup", 0, "ours: as the other schedules"),
        Default("floor", 0.0, "paper: to zero"),
    ),
    verified={
        "equation": ("tests/schedule/test_warmup_decay.py::test_closed_forms",),
        "reference": ("tests/schedule/test_warmup_decay.py::test_equals_torchs_schedulers",),
    },
    deviations=("The paper's refined schedules, from the gradient norms of an earlier run, are not here.",),
)
