"""Inverse square root: linear warm-up, then a rate that falls with the square root of the step and never ends.

    factor(t) = (t + 1) / w for t < w,   sqrt(w / (t + 1)) after

Vaswani et al. 2017 (arXiv:1706.03762), equation 3, scaled to a largest factor of 1.
"""

from __future__ import annotations

import math

from trimtab.card import Card, Default, Paper
from trimtab.schedule._shape import Shape, whole

__all__ = ["inverse_sqrt"]


def inverse_sqrt(*, warmup: int = 4000) -> Shape:
    """Return linear warm-up to 1 at step `warmup`, then sqrt(warmup / (t + 1)).

    Args:
        warmup: steps of the warm-up, at least 1.

    Returns:
        The schedule; it has no end.

    Raises:
        UsageError: if `warmup` is not a whole number of at least 1.

    Example:
        >>> schedule = inverse_sqrt(warmup=4)
        >>> [schedule(step) for step in (0, 3, 15)]
        [0.25, 1.0, 0.5]

    References:
        Vaswani et al. 2017, arXiv:1706.03762.
    """
    whole("warmup", warmup, 1)

    def factor(step: int) -> float:
        return min((step + 1) / warmup, math.sqrt(warmup / (step + 1)))

    return Shape("inverse-sqrt", factor, None, (("warmup", warmup),))


CARD = Card(
    name="inverse-sqrt",
    room="schedule",
    summary="linear warm-up, then a rate that falls with the square root of the step",
    paper=Paper("Attention Is All You Need", 2017, arxiv="1706.03762"),
    equation="factor = min((t + 1) / w, sqrt(w / (t + 1)))",
    claim="Trains Transformers without knowing the number of steps in advance.",
    acts_on="settings",
    entry="trimtab.schedule.inverse_square_root:inverse_sqrt",
    defaults=(Default("warmup", 4000, "paper, section 5.3"),),
    verified={"equation": ("tests/schedule/test_open_ended.py::test_inverse_sqrt_is_the_papers_up_to_a_factor",)},
    deviations=("Scaled to a largest factor of 1; the paper's rate is this times d^-0.5 w^-0.5.",),
)
