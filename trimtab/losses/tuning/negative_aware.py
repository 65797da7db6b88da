"""Negative-aware training: failed trajectories kept in fine-tuning, after another prompt than those that succeed.

    loss = -log pi(y | x, "good") on positive trajectories, -w log pi(y | x, "bad") on negative ones

Both kinds are learned, each under its own prompt; the positive prompt is used at test time. What makes the method is
the prompt, which is data (`prepend_control`). The side of the loss is here: which tokens count, and how much a negative
trajectory does. Wang et al. 2024 (arXiv:2402.11651).

Shape suffixes: B trajectories, L positions, V classes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trimtab.card import Card, Default, Experiment, Paper
from trimtab.losses._reduction import reduce
from trimtab.losses.preference._pairs import check_number
from trimtab.losses.tuning._tokens import check_mask, token_log_probs

__all__ = ["negative_aware_loss"]


def negative_aware_loss(
    logits: Tensor,
    targets: Tensor,
    positive: Tensor,
    *,
    negative_weight: float = 1.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    denominator: float | Tensor | None = None,
) -> Tensor:
    """Return cross-entropy with a weight on the tokens of negative trajectories.

    Args:
        logits: [B, L, V], from inputs that begin with the prompt of their kind (`prepend_control`).
        targets: [B, L]; prompts, observations of tools and padding are `ignore_index`.
        positive: which trajectories succeeded, boolean, [B].
        negative_weight: w, at least 0; at 1 it is plain fine-tuning on both (the paper), at 0 negatives are dropped.
        ignore_index: target that does not count.
        reduction: `"mean"` over the weights of the targets that count, `"sum"` or `"none"`.
        denominator: what the mean divides by in place of the sum of weights.

    Returns:
        A scalar, or [B, L] with reduction `"none"`, in float32 or better. Without any token that counts it is 0.

    Raises:
        UsageError: if an argument breaks its rule.

    Example:
        >>> logits, targets = torch.zeros(2, 1, 4), torch.zeros(2, 1, dtype=torch.int64)
        >>> round(float(negative_aware_loss(logits, targets, torch.tensor([True, False]))), 4)  # log 4
        1.3863

    References:
        Wang et al. 2024, arXiv:2402.11651 (https://github.com/Reason-Wang/NAT).
    """
    check_number("negative_weight", negative_weight, 0)
    log_probs, valid = token_log_probs(logits, targets, ignore_index)
    good = check_mask("positive", positive, targets.shape[:1]).reshape(-1, *(1,) * (targets.dim() - 1))
    # In their own dtype: a scalar of Python in torch.where would be rounded to float32.
    ones = torch.ones_like(log_probs)
    weights = torch.where(good, ones, negative_weight * ones) * valid
    if reduction == "mean" and denominator is None:
        total = weights.sum()
        denominator = torch.where(total > 0, total, torch.ones_like(total))
    return reduce(-weights * log_probs, None, reduction, denominator)


CARD = Card(
    name="negative-aware",
    room="losses",
    summary="failed trajectories kept in fine-tuning under a prompt of their own, with a weight",
    paper=Paper(
        "Learning From Failure: Integrating Negative Examples when Fine-tuning Large Language Models as Agents",
        2024,
        arxiv="2402.11651",
        code="https://github.com/Reason-Wang/NAT",
    ),
    equation="loss = -log pi(y | x, good prompt) on positives, -w log pi(y | x, bad prompt) on negatives; w = 1",
    claim="Beats fine-tuning on positive trajectories alone in mathematics, multi-hop and strategic questions.",
    acts_on="loss",
    entry="trimtab.losses.tuning.negative_aware:negative_aware_loss",
    defaults=(
        Default("negative_weight", 1.0, "paper: both kinds alike"),
        Default("reduction", "mean", "ours: over weights"),
        Default("ignore_index", -100, "torch.nn.functional.cross_entropy"),
    ),
    verified={
        "equation": (
            "tests/losses/tuning/test_negative_aware.py::test_equals_a_plain_loop",
            "tests/losses/tuning/test_negative_aware.py::test_weight_1_is_plain_fine_tuning",
            "tests/losses/tuning/test_contract.py::test_micro_batches_add_up",
        ),
    },
    deviations=("The weight is an addition: the paper's loss is plain, and the method is in the prompts.",),
    experiments=(
        Experiment(
            "trimtab.studies.fine_tuning:trajectories",
            "negative_weight=0",
            "negative_weight=1",
            metric="accuracy",
            higher_is_better=True,
            mechanism="kind_accuracy",
            outcome=(
                "better: accuracy 0.19 to 0.42, difference +0.23 (95 % interval +0.07 to +0.39), n=5; the step "
                "that failures get right 0.19 to 0.84, +0.65 (+0.59 to +0.71)"
            ),
        ),
        Experiment(
            "trimtab.studies.fine_tuning:trajectories",
            "negative_weight=1,prefixes=false",
            "negative_weight=1",
            metric="accuracy",
            higher_is_better=True,
            mechanism="kind_accuracy",
            outcome=(
                "no evidence for the prefix: accuracy 0.37 to 0.42, difference +0.05 (95 % interval -0.05 to "
                "+0.15), n=5; the step that failures get right 0.92 to 0.84, -0.08 (-0.10 to -0.06)"
            ),
        ),
    ),
)
