"""Untuned warm-up for Adam: a length that follows from beta2 alone.

    linear:       factor(t) = min(1, t (1 - beta2) / 2), that is 2 / (1 - beta2) steps
    exponential:  factor(t) = 1 - exp(-(1 - beta2) t),           t counted from 1

Ma and Yarats 2021 (arXiv:1910.04209): it does what RAdam's rectification does.
"""

from __future__ import annotations

import math

from trimtab.card import Card, Default, Paper
from trimtab.errors import UsageError, choose
from trimtab.schedule._shape import Shape

__all__ = ["adam_warmup"]


def adam_warmup(*, beta2: float = 0.999, form: str = "linear") -> Shape:
    """Return warm-up over about 2 / (1 - beta2) steps, then 1 for ever; multiply another schedule by it.

    Args:
        beta2: Adam's, in [0, 1).
        form: "linear" or "exponential".

    Returns:
        The schedule; it has no end.

    Raises:
        UsageError: if an argument breaks its rule.

    Example:
        >>> schedule = adam_warmup(beta2=0.99)
        >>> [round(schedule(step), 3) for step in (0, 99, 199, 5000)]
        [0.005, 0.5, 1.0, 1.0]

    References:
        Ma and Yarats 2021, arXiv:1910.04209.
    """
    choose("form", form, ("linear", "exponential"))
    if isinstance(beta2, bool) or not isinstance(beta2, (int, float)) or not 0 <= beta2 < 1:
        raise UsageError(f"beta2 must be in [0, 1), got {beta2!r}.")

    def factor(step: int) -> float:
        if form == "linear":
            return min(1.0, 0.5 * (1 - beta2) * (step + 1))
        return -math.expm1(-(1 - beta2) * (step + 1))

    return Shape("adam-warmup", factor, None, (("beta2", beta2), ("form", form)))


CARD = Card(
    name="adam-warmup",
    room="schedule",
    summary="warm-up for Adam whose length follows from beta2",
    paper=Paper("On the adequacy of untuned warmup for adaptive optimization", 2021, arxiv="1910.04209"),
    equation="factor = min(1, (1 - beta2) t / 2), t counted from 1",
    claim="Linear warm-up over 2 / (1 - beta2) steps is as good as RAdam in typical settings.",
    acts_on="settings",
    entry="trimtab.schedule.untuned_warmup:adam_warmup",
    defaults=(
        Default("beta2", 0.999, "torch.optim.AdamW"),
        Default("form", "linear", "paper: its recommendation"),
    ),
    verified={"equation": ("tests/schedule/test_open_ended.py::test_adam_warmup_ends_after_two_over_one_minus_beta2",)},
)
