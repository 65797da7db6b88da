"""Robust DPO: an unbiased estimate of DPO's loss from labels that are flipped with a known probability.

    h    = beta [log-ratio of y_w - log-ratio of y_l]
    loss = [ -(1 - e) log sigmoid(h) + e log sigmoid(-h) ] / (1 - 2 e)

Its expectation over flips is the loss on the clean label. Chowdhury, Kini and Natarajan 2024 (arXiv:2403.00409). The
conservative form, which has a minus in its second term and is biased but bounded below, is `dpo_loss` with
`label_smoothing`.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from trimtab.card import Card, Default, Experiment, Paper
from trimtab.errors import UsageError
from trimtab.losses._reduction import reduce
from trimtab.losses.preference._pairs import check_number, log_probabilities

__all__ = ["robust_dpo_loss"]


def robust_dpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    *,
    beta: float = 0.1,
    flip_rate: float = 0.1,
    reduction: str = "mean",
    denominator: float | Tensor | None = None,
) -> Tensor:
    """Return [-(1 - e) log sigmoid(h) + e log sigmoid(-h)] / (1 - 2 e), h the margin of DPO.

    Args:
        policy_chosen: log pi(y_w), [B], sums over tokens.
        policy_rejected: log pi(y_l), [B].
        ref_chosen: log ref(y_w), [B].
        ref_rejected: log ref(y_l), [B].
        beta: strength of the pull to the reference, above 0.
        flip_rate: e, probability that a label is wrong, in [0, 0.5); at 0 it is DPO.
        reduction: `"mean"`, `"sum"` or `"none"`.
        denominator: what the mean divides by in place of the number of pairs.

    Returns:
        A scalar, or [B] with reduction `"none"`, in float32 or better. It has no lower bound: on a pair with a large
        margin it goes on falling as the margin grows.

    Raises:
        UsageError: if an argument breaks its rule.

    Example:
        >>> import torch
        >>> zero = torch.zeros(1)
        >>> round(float(robust_dpo_loss(zero, zero, zero, zero)), 4)  # log 2, whatever e is
        0.6931

    References:
        Chowdhury et al. 2024, arXiv:2403.00409, equation 12.
    """
    check_number("beta", beta, 0, open_low=True)
    if check_number("flip_rate", flip_rate, 0, 0.5) == 0.5:
        raise UsageError("flip_rate must be below 0.5: labels that are wrong half of the time say nothing.")
    pi_w, pi_l, ref_w, ref_l = log_probabilities(
        policy_chosen=policy_chosen, policy_rejected=policy_rejected, ref_chosen=ref_chosen, ref_rejected=ref_rejected
    )
    margin = beta * ((pi_w - ref_w) - (pi_l - ref_l))
    values = flip_rate * F.logsigmoid(-margin) - (1 - flip_rate) * F.logsigmoid(margin)
    return reduce(values / (1 - 2 * flip_rate), None, reduction, denominator)


CARD = Card(
    name="robust-dpo",
    room="losses",
    summary="an unbiased estimate of DPO's loss from labels flipped at a known rate",
    paper=Paper(
        "Provably Robust DPO: Aligning Language Models with Noisy Feedback",
        2024,
        arxiv="2403.00409",
    ),
    equation="loss = [-(1 - e) log sigmoid(h) + e log sigmoid(-h)] / (1 - 2 e)",
    claim="Its gap to the clean optimum shrinks with the data at any flip rate below 1/2, where DPO keeps a bias.",
    acts_on="loss",
    entry="trimtab.losses.preference.robust_preference:robust_dpo_loss",
    defaults=(
        Default("beta", 0.1, "ours: DPO's"),
        Default("flip_rate", 0.1, "ours: the paper's is that of the data"),
        Default("reduction", "mean", "paper: an expectation over pairs"),
    ),
    verified={
        "equation": (
            "tests/losses/preference/test_robust_preference.py::test_equals_numpy",
            "tests/losses/preference/test_robust_preference.py::test_expectation_over_flips_is_dpo",
        ),
        "reference": (
            "tests/losses/preference/test_trl_reference.py::test_losses_of_scores_equal_dpo_trainer",
            "tests/losses/preference/test_trl_reference.py::test_current_dpo_trainer",
        ),
    },
    experiments=(
        Experiment(
            "trimtab.studies.preferences:pairs",
            "loss=dpo,lr=0.01,flips=0.3",
            "loss=robust-dpo,lr=0.003,flips=0.3",
            metric="reward",
            higher_is_better=True,
            mechanism="kl",
            outcome=(
                "no evidence: 1.46 to 0.928, difference -0.531 (95 % interval -1.17 to 0.111), n=5; kl 4.94 to 3.88"
            ),
        ),
    ),
)
