"""iLR-DPO: DPO whose policy pays for the length of its responses.

The policy that maximises reward - alpha |y| at a KL cost beta has beta log(pi / ref) = r - alpha |y| + const, so that
the difference of rewards, on which the Bradley-Terry likelihood depends, is

    h    = beta [ (log pi(y_w) - log ref(y_w)) - (log pi(y_l) - log ref(y_l)) ] + alpha (|y_w| - |y_l|)
    loss = -log sigmoid(h)

The sign is plus: a longer chosen response has part of its margin explained by its length, and is pushed less. Liu et
al. 2024 (arXiv:2406.11817), after Park et al. 2024 (arXiv:2403.19159). It is meant for the iterated form, where pairs
are sampled anew from each policy.
"""

from __future__ import annotations

from torch import Tensor

from trimtab.card import Card, Default, Experiment, Paper
from trimtab.losses._reduction import reduce
from trimtab.losses.preference._pairs import check_number, lengths, log_probabilities, logistic

__all__ = ["ilr_dpo_loss"]


def ilr_dpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    *,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    beta: float = 0.1,
    alpha: float = 0.02,
    reduction: str = "mean",
    denominator: float | Tensor | None = None,
) -> Tensor:
    """Return -log sigmoid(beta [difference of log-ratios] + alpha (|y_w| - |y_l|)).

    Args:
        policy_chosen: log pi(y_w), [B], sums over tokens (`sequence_log_probs`).
        policy_rejected: log pi(y_l), [B].
        ref_chosen: log ref(y_w), [B].
        ref_rejected: log ref(y_l), [B].
        chosen_lengths: |y_w|, tokens, [B], above 0.
        rejected_lengths: |y_l|, [B], above 0.
        beta: strength of the pull to the reference, above 0.
        alpha: price of one token in units of reward, at least 0; at 0 it is DPO.
        reduction: `"mean"`, `"sum"` or `"none"`.
        denominator: what the mean divides by in place of the number of pairs.

    Returns:
        A scalar, or [B] with reduction `"none"`, in float32 or better.

    Raises:
        UsageError: if an argument breaks its rule.

    Example:
        >>> import torch
        >>> zero, long, short = torch.zeros(1), torch.tensor([60]), torch.tensor([10])
        >>> round(float(ilr_dpo_loss(zero, zero, zero, zero, chosen_lengths=long, rejected_lengths=short)), 4)
        0.3133

    References:
        Liu et al. 2024, arXiv:2406.11817; Park et al. 2024, arXiv:2403.19159.
    """
    check_number("beta", beta, 0, open_low=True)
    check_number("alpha", alpha, 0)
    pi_w, pi_l, ref_w, ref_l = log_probabilities(
        policy_chosen=policy_chosen, policy_rejected=policy_rejected, ref_chosen=ref_chosen, ref_rejected=ref_rejected
    )
    long_w, long_l = lengths(pi_w, chosen_lengths=chosen_lengths, rejected_lengths=rejected_lengths)
    margin = beta * ((pi_w - ref_w) - (pi_l - ref_l)) + alpha * (long_w - long_l)
    return reduce(logistic(margin, 0.0), None, reduction, denominator)


CARD = Card(
    name="ilr-dpo",
    room="losses",
    summary="DPO whose margin counts the difference of lengths, so that longer responses are not what it learns",
    paper=Paper(
        "Iterative Length-Regularized Direct Preference Optimization: A Case Study on Improving 7B Language Models to "
        "GPT-4 Level",
        2024,
        arxiv="2406.11817",
    ),
    equation="loss = -log sigmoid(beta [log-ratio of y_w - log-ratio of y_l] + alpha (|y_w| - |y_l|))",
    claim="Iterated DPO stays as short as its reference while it reaches a 50.5 % win rate against GPT-4 Preview.",
    acts_on="loss",
    entry="trimtab.losses.preference.length_regularized:ilr_dpo_loss",
    defaults=(
        Default("beta", 0.1, "ours: DPO's"),
        Default("alpha", 0.02, "ours: 50 tokens cost one unit of reward"),
        Default("reduction", "mean", "paper: an expectation over pairs"),
    ),
    verified={
        "equation": (
            "tests/losses/preference/test_length_regularized.py::test_equals_numpy",
            "tests/losses/preference/test_length_regularized.py::test_alpha_0_is_dpo",
            "tests/losses/preference/test_length_regularized.py::test_bandit_reaches_the_policy_that_pays_for_length",
        ),
    },
    deviations=(
        "The equation is recalled; its sign is derived: with a minus, the minimiser would be paid for length.",
        "The sampling of new pairs between iterations is the training loop's.",
    ),
    experiments=(
        Experiment(
            "trimtab.studies.preferences:pairs",
            "loss=dpo,lr=0.01,length_bias=0.5",
            "loss=ilr-dpo,lr=0.01,length_bias=0.5",
            metric="letters",
            mechanism="reward",
            outcome=(
                "no evidence: 3.81 to 3.81, difference 0.00587 (95 % interval -0.00959 to 0.0213), n=5; reward "
                "1.83 to 1.87"
            ),
        ),
    ),
)
