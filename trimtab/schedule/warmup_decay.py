"""Warm-up and decay to the end: linear or cosine.

    factor(t) = (t + 1) / (w + 1)                      for t < w
    factor(t) = floor + (1 - floor) d((t - w) / (T - w))   for w <= t <= T,  and factor(T) after

with d(x) = 1 - x (linear) or (1 + cos(pi x)) / 2 (cosine). Loshchilov and Hutter 2017 (arXiv:1608.03983) for cosine;
Defazio et al. 2023 (arXiv:2310.07831) for linear, which their theory prefers.
"""

from __future__ import annotations

from trimtab.card import Card, Default, Paper
from trimtab.schedule._shape import Shape, decay_form, falling, rising, spans, whole

__all__ = ["cosine", "linear"]


def cosine(total: int, *, warmup: int = 0, floor: float = 0.0) -> Shape:
    """Return linear warm-up and cosine decay: floor + (1 - floor) (1 + cos(pi x)) / 2, x from 0 to 1 after the warm-up.

    Args:
        total: steps until the floor is reached, at least 1.
        warmup: steps of linear warm-up, less than `total`.
        floor: last factor, in [0, 1].

    Returns:
        The schedule.

    Raises:
        UsageError: if an argument breaks its rule.

    Example:
        >>> schedule = cosine(100, warmup=9)
        >>> [round(schedule(step), 3) for step in (0, 8, 9, 100, 1000)]
        [0.1, 0.9, 1.0, 0.0, 0.0]
    """
    return _decayed("cosine", total, warmup, floor)


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
    return _decayed("linear", total, warmup, floor)


def _decayed(form: str, total: int, warmup: int, floor: float) -> Shape:
    whole("total", total, 1)
    spans(total - 1, warmup=warmup)
    _, floor = decay_form(form, floor)

    def factor(step: int) -> float:
        if step < warmup:
            return rising(step, warmup)
        return falling(form, min(1.0, (step - warmup) / (total - warmup)), floor)

    return Shape(form, factor, total, (("total", total), ("warmup", warmup), ("floor", floor)))


CARD = Card(
    name="cosine",
    room="schedule",
    summary="linear warm-up, then cosine (or linear) decay to the end",
    paper=Paper("SGDR: Stochastic Gradient Descent with Warm Restarts", 2017, arxiv="1608.03983"),
    equation="factor = floor + (1 - floor) (1 + cos(pi (t - w) / (T - w))) / 2",
    claim="Decaying the learning rate along a cosine reaches better losses at any time than steps or a constant rate.",
    acts_on="settings",
    entry="trimtab.schedule.warmup_decay:cosine",
    defaults=(
        Default("warmup", 0, "torch.optim.lr_scheduler.CosineAnnealingLR has none"),
        Default("floor", 0.0, "paper: eta_min = 0"),
    ),
    verified={
        "equation": ("tests/schedule/test_warmup_decay.py::test_closed_forms",),
        "reference": ("tests/schedule/test_warmup_decay.py::test_equals_torchs_schedulers",),
    },
    deviations=("Without restarts. The warm-up is (t + 1) / (w + 1), so that the first step is not lost at rate 0.",),
)
