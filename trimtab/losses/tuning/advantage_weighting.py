"""Reward- and advantage-weighted training: cross-entropy with weights that grow with how good a text is.

    loss = -exp(A_i / beta) log pi(y_i),   A = reward, or reward minus a value

Peters and Schaal 2007 (reward-weighted regression) and Peng et al. 2019 (advantage-weighted, arXiv:1910.00177), as two
of the objectives of Korbak et al. 2023 (arXiv:2302.08582); authors' code tomekkorbak/pretraining-with-human-feedback,
apo/objectives.py.

Shape suffixes: B sequences, L positions, V classes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trimtab.card import Card, Default, Experiment, Paper
from trimtab.losses._reduction import reduce
from trimtab.losses.preference._pairs import check_number
from trimtab.losses.tuning._tokens import for_tokens, token_log_probs

__all__ = ["advantage_weighted_loss"]


def advantage_weighted_loss(
    logits: Tensor,
    targets: Tensor,
    advantages: Tensor,
    *,
    beta: float = 1.0,
    max_weight: float = 1000.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    denominator: float | Tensor | None = None,
) -> Tensor:
    """Return -min(exp(A_i / beta), max_weight) log pi(y_i), with no gradient through the weight.

    Args:
        logits: [B, L, V].
        targets: [B, L], class indices.
        advantages: A, [B] or [B, L]: rewards, or rewards less a baseline; at 0 it is plain training.
        beta: how evenly, above 0.
        max_weight: bound on a weight, above 0.
        ignore_index: target that does not count.
        reduction: `"mean"` over the targets that count, `"sum"` or `"none"`.
        denominator: what the mean divides by in place of the number of targets that count.

    Returns:
        A scalar, or [B, L] with reduction `"none"`, in float32 or better.

    Raises:
        UsageError: if an argument breaks its rule.

    Example:
        >>> loss = advantage_weighted_loss(torch.zeros(1, 1, 4), torch.tensor([[0]]), torch.tensor([0.5]))
        >>> round(float(loss), 4)  # sqrt(e) log 4
        2.2856

    References:
        Peng et al. 2019, arXiv:1910.00177; Korbak et al. 2023, arXiv:2302.08582, section 2.
    """
    check_number("beta", beta, 0, open_low=True)
    check_number("max_weight", max_weight, 0, open_low=True)
    log_probs, valid = token_log_probs(logits, targets, ignore_index)
    weights = torch.exp(for_tokens("advantages", advantages, log_probs) / beta).clamp(max=max_weight)
    return reduce(-weights * log_probs, valid, reduction, denominator)


CARD = Card(
    name="advantage-weighted",
    room="losses",
    summary="cross-entropy with weights that grow exponentially with reward or advantage",
    paper=Paper(
        "Advantage-Weighted Regression: Simple and Scalable Off-Policy Reinforcement Learning",
        2019,
        arxiv="1910.00177",
        code="https://github.com/tomekkorbak/pretraining-with-human-feedback",
    ),
    equation="loss = -min(exp(A / beta), w_max) log p",
    claim="Off-policy improvement of a policy by supervised learning alone.",
    acts_on="loss",
    entry="trimtab.losses.tuning.advantage_weighting:advantage_weighted_loss",
    defaults=(
        Default("beta", 1.0, "Korbak et al.'s code"),
        Default("max_weight", 1000.0, "Korbak et al.'s code"),
        Default("reduction", "mean", "Korbak et al.'s code: over all tokens, not over the weights"),
        Default("ignore_index", -100, "torch.nn.functional.cross_entropy"),
    ),
    verified={
        "equation": (
            "tests/losses/tuning/test_advantage_weighting.py::test_equals_numpy",
            "tests/losses/tuning/test_advantage_weighting.py::test_advantage_0_is_plain_training",
            "tests/losses/tuning/test_contract.py::test_micro_batches_add_up",
        ),
    },
    deviations=(
        "The value and its loss, which Korbak et al. learn with a head of the model, are the caller's.",
        "Reward-weighted regression is the case of advantages that are rewards; its weights are not divided by their "
        "sum over the batch, which would couple micro-batches.",
    ),
    experiments=(
        Experiment(
            "trimtab.studies.fine_tuning:preferences",
            "method=plain",
            "method=advantage",
            metric="bad_rate",
            mechanism="clean_loss",
            outcome=(
                "better: bad words 7.7 % to 1.5 %, difference -6.2 points (95 % interval -6.8 to -5.6), n=5; "
                "loss of clean texts 1.656 to 1.629, -0.027 (-0.038 to -0.017)"
            ),
        ),
    ),
)
