"""Lower the learning rate: the first thing to try when training diverges.

The largest stable learning rate is close to the best one; when training diverges, try again with a smaller one:

    lr <- lr / factor

Bengio 2012, "Practical recommendations for gradient-based training of deep architectures" (arXiv:1206.5533), section
3.1.1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trimtab.card import Card, Default, Experiment, Paper
from trimtab.errors import UsageError

__all__ = ["with_lower_lr"]


def with_lower_lr(settings: Mapping[str, Any], *, factor: float = 10.0) -> dict[str, Any]:
    """Return settings whose learning rate is divided by a factor.

    Args:
        settings: any settings with an `"lr"` above 0; they stay as they are.
        factor: above 1.

    Returns:
        The changed copy.

    Raises:
        UsageError: if there is no learning rate above 0, or the factor is not above 1.

    Example:
        >>> with_lower_lr({"optimizer": "adamw", "lr": 0.5})
        {'optimizer': 'adamw', 'lr': 0.05}
    """
    if not 1 < factor < float("inf"):
        raise UsageError(f"factor must be above 1 and finite, got {factor}: 10 is the default.")
    lr = settings.get("lr")
    if not isinstance(lr, (int, float)) or isinstance(lr, bool) or not lr > 0:
        raise UsageError(f"lower-lr needs settings with an 'lr' above 0, got {lr!r}.")
    return {**settings, "lr": lr / factor}


CARD = Card(
    name="lower-lr",
    room="schedule",
    summary="the learning rate divided by ten",
    paper=Paper("Practical recommendations for gradient-based training of deep architectures", 2012, arxiv="1206.5533"),
    equation="lr <- lr / factor",
    claim=(
        "The best learning rate is usually within a factor of two of the largest that does not diverge; after a "
        "divergence, try again with one three times smaller, until there is none."
    ),
    acts_on="settings",
    entry="trimtab.schedule.lower_lr:with_lower_lr",
    treats={
        "lr-too-high": 1,
        "loss-divergence": 1,
        "update-too-large": 1,
        "loss-spike": 2,
        "gradient-spike": 2,
        "exploding-gradient": 2,
        "non-finite": 2,
        "dead-units": 2,
        "attention-logit-growth": 3,
        "attention-entropy-collapse": 3,
        "output-logit-drift": 3,
    },
    defaults=(
        Default(
            "factor",
            10.0,
            "ours: one step of the usual grid of learning rates, so that one retry leaves the unstable range",
        ),
    ),
    verified={"equation": ("tests/schedule/test_lower_lr.py::test_divides_only_the_learning_rate",)},
    deviations=("The paper divides by three, again and again; the default divides by ten, once.",),
    experiments=(
        Experiment(
            "lm-small",
            "lr=0.1",
            "lr=0.1,with=lower-lr",
            mechanism="attention_max_logit",
            outcome=(
                "better: final loss 2.148 to 1.679, difference -0.469 (95 % interval -0.547 to -0.390), n=5; largest "
                "attention logit 2,160 to 46"
            ),
        ),
    ),
    apply=with_lower_lr,
)
