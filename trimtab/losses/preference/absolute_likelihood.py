"""ASFT: fine-tuning with an absolute likelihood for the chosen and for the rejected response, without a reference.

    p(y)  = exp(log pi(y) / |y|),   f(y) = log( p(y) / (1 - p(y)) )
    loss  = -log p(y_w) + lambda [ -log sigmoid(f(y_w)) - log sigmoid(-f(y_l)) ]

Wang et al. 2024 (arXiv:2409.10571). As sigmoid(f(y)) = p(y), the term in brackets is -log p(y_w) - log(1 - p(y_l)), and
is computed as that: likelihood and unlikelihood of whole responses, where ORPO compares their odds.
"""

from __future__ import annotations

from torch import Tensor

from trimtab.card import Card, Default, Experiment, Paper
from trimtab.losses._reduction import reduce
from trimtab.losses._stable import log1mexp
from trimtab.losses.preference._pairs import check_number, lengths, log_probabilities

__all__ = ["asft_loss"]


def asft_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    *,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    align_weight: float = 1.0,
    reduction: str = "mean",
    denominator: float | Tensor | None = None,
) -> Tensor:
    """Return -log p(y_w) + lambda [-log p(y_w) - log(1 - p(y_l))], p the geometric mean of a response's probabilities.

    Args:
        policy_chosen: log pi(y_w), [B], sums over tokens.
        policy_rejected: log pi(y_l), [B].
        chosen_lengths: |y_w|, tokens, [B], above 0.
        rejected_lengths: |y_l|, [B], above 0.
        align_weight: lambda, at least 0; at 0 it is plain fine-tuning on the chosen responses.
        reduction: `"mean"`, `"sum"` or `"none"`.
        denominator: what the mean divides by in place of the number of pairs.

    Returns:
        A scalar, or [B] with reduction `"none"`, in float32 or better. A rejected response closer to certainty than one
        rounding step counts as that close, and gets no gradient.

    Raises:
        UsageError: if an argument breaks its rule.

    Example:
        >>> import torch
        >>> half, tokens = torch.tensor([-4.0]) * torch.tensor(2.0).log(), torch.tensor([4])
        >>> round(float(asft_loss(half, half, chosen_lengths=tokens, rejected_lengths=tokens)), 4)  # 3 log 2
        2.0794

    References:
        Wang et al. 2024, arXiv:2409.10571; in the same form in Gorbatovski et al. 2025, arXiv:2502.01237, section 2.4.
    """
    check_number("align_weight", align_weight, 0)
    pi_w, pi_l = log_probabilities(policy_chosen=policy_chosen, policy_rejected=policy_rejected)
    long_w, long_l = lengths(pi_w, chosen_lengths=chosen_lengths, rejected_lengths=rejected_lengths)
    values = -(1 + align_weight) * pi_w / long_w - align_weight * log1mexp(pi_l / long_l)
    return reduce(values, None, reduction, denominator)


CARD = Card(
    name="asft",
    room="losses",
    summary="likelihood of the chosen and unlikelihood of the rejected response, each by itself, without a reference",
    paper=Paper("ASFT: Aligned Supervised Fine-Tuning through Absolute Likelihood", 2024, arxiv="2409.10571"),
    equation="loss = -log p_w + lambda [-log sigmoid(f_w) - log sigmoid(-f_l)], f = log(p / (1 - p)), p = pi^(1 / |y|)",
    claim="Outperforms DPO and ORPO; the rejected does not fall faster than the chosen rises, as it does under DPO.",
    acts_on="loss",
    entry="trimtab.losses.preference.absolute_likelihood:asft_loss",
    treats={"chosen-likelihood-drop": 3},
    defaults=(
        Default("align_weight", 1.0, "ours: both parts alike"),
        Default("reduction", "mean", "paper: an expectation over pairs"),
    ),
    verified={
        "equation": (
            "tests/losses/preference/test_absolute_likelihood.py::test_equals_numpy",
            "tests/losses/preference/test_absolute_likelihood.py::test_weight_0_is_plain_fine_tuning",
        ),
        "claim": ("tests/losses/preference/test_absolute_likelihood.py::test_chosen_likelihood_rises",),
    },
    deviations=("The division of log pi by |y| is recalled; with chosen_lengths of 1 it drops out.",),
    experiments=(
        Experiment(
            "trimtab.studies.preferences:pairs",
            "loss=dpo",
            "loss=asft",
            metric="chosen_log_prob",
            higher_is_better=True,
            mechanism="reward",
            outcome="better: -7.15 to 0.238, difference 7.39 (95 % interval 5.3 to 9.48), n=5; reward 1.81 to 0.381",
        ),
    ),
)
