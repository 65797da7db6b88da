"""Warm-up, then decay along a cosine to the end.

    factor(t) = (t + 1) / (w + 1)                                              for t < w
    factor(t) = floor + (1 - floor) (1 + cos(pi (t - w) / (T - w))) / 2        for w <= t <= T,  and factor(T) after

Loshchilov and Hutter 2017 (arXiv:1608.03983).
"""

from __future__ import annotations

from trimtab.card import Card, Default, Paper
from trimtab.schedule._shape import Shape, decayed

__all__ = ["cosine"]


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
    return decayed("cosine", total, warmup, floor)


CARD = Card(
    name="cosine",
    room="schedule",
    summary="linear warm-up, then cosine decay to the end",
    paper=Paper("SGDR: Stochastic Gradient Descent with Warm Restarts", 2017, arxiv="1608.03983"),
    equation="factor = floor + (1 - floor) (1 + cos(pi (t - w) / (T - w))) / 2",
    claim="Decaying the learning rate along a cosine reaches better losses at any time than steps or a constant rate.",
    acts_on="settings",
    entry="trimtab.schedule.cosine_decay:cosine",
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
