"""Flex-DPO: DPO with a scale of its own for the rejected response, and a likelihood term.

    h    = beta_w (log pi(y_w) - log ref(y_w)) - beta_l (log pi(y_l) - log ref(y_l))
    loss = -log sigmoid(h) - sft_weight log pi(y_w)

In DPO the gradient to the rejected response's probability grows without bound as it falls, and that to the chosen one's
vanishes: the rejected drops drastically, learning degrades into unlearning, and mass disperses to unseen responses (the
3D-properties). A smaller beta_l slows the fall, and the likelihood term keeps the chosen up. Yan et al. 2024
(arXiv:2406.07327).
"""

from __future__ import annotations

from torch import Tensor

from trimtab.card import Card, Default, Experiment, Paper
from trimtab.losses._reduction import reduce
from trimtab.losses.preference._pairs import check_number, lengths, log_probabilities, logistic

__all__ = ["flex_dpo_loss"]


def flex_dpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    *,
    chosen_lengths: Tensor | None = None,
    beta_chosen: float = 0.1,
    beta_rejected: float = 0.05,
    sft_weight: float = 0.0,
    reduction: str = "mean",
    denominator: float | Tensor | None = None,
) -> Tensor:
    """Return -log sigmoid(beta_w [log-ratio of y_w] - beta_l [log-ratio of y_l]) - sft_weight log pi(y_w).

    Args:
        policy_chosen: log pi(y_w), [B], sums over tokens.
        policy_rejected: log pi(y_l), [B].
        ref_chosen: log ref(y_w), [B].
        ref_rejected: log ref(y_l), [B].
        chosen_lengths: [B]; where given, the likelihood term is a mean over each response's tokens.
        beta_chosen: beta_w, above 0.
        beta_rejected: beta_l, at least 0; equal to beta_w it is DPO.
        sft_weight: of the likelihood term, at least 0.
        reduction: `"mean"`, `"sum"` or `"none"`.
        denominator: what the mean divides by in place of the number of pairs.

    Returns:
        A scalar, or [B] with reduction `"none"`, in float32 or better.

    Raises:
        UsageError: if an argument breaks its rule.

    Example:
        >>> import torch
        >>> scores = torch.tensor([-2.0])
        >>> round(float(flex_dpo_loss(scores, scores, scores, scores, sft_weight=1.0)), 4)  # log 2 + 2
        2.6931

    References:
        Yan et al. 2024, arXiv:2406.07327, section 3.4 and experiments.
    """
    check_number("beta_chosen", beta_chosen, 0, open_low=True)
    check_number("beta_rejected", beta_rejected, 0)
    check_number("sft_weight", sft_weight, 0)
    pi_w, pi_l, ref_w, ref_l = log_probabilities(
        policy_chosen=policy_chosen, policy_rejected=policy_rejected, ref_chosen=ref_chosen, ref_rejected=ref_rejected
    )
    likelihood = pi_w if chosen_lengths is None else pi_w / lengths(pi_w, chosen_lengths=chosen_lengths)[0]
    margin = beta_chosen * (pi_w - ref_w) - beta_rejected * (pi_l - ref_l)
    return reduce(logistic(margin, 0.0) - sft_weight * likelihood, None, reduction, denominator)


CARD = Card(
    name="flex-dpo",
    room="losses",
    summary="DPO with a smaller scale for the rejected response and a likelihood term, against its three pathologies",
    paper=Paper("3D-Properties: Identifying Challenges in DPO and Charting a Path Forward", 2024, arxiv="2406.07327"),
    equation="loss = -log sigmoid(beta_w [log-ratio of y_w] - beta_l [log-ratio of y_l]) - sft_weight log pi(y_w)",
    claim="Slows the fall of the rejected likelihood, and makes DPO more stable and its result better.",
    acts_on="loss",
    entry="trimtab.losses.preference.flexible_betas:flex_dpo_loss",
    treats={"chosen-likelihood-drop": 4},
    defaults=(
        Default("beta_chosen", 0.1, "ours: DPO's"),
        Default("beta_rejected", 0.05, "ours: half of it; the paper searches both"),
        Default("sft_weight", 0.0, "ours: one regulariser at a time"),
        Default("reduction", "mean", "paper: an expectation over pairs"),
    ),
    verified={
        "equation": (
            "tests/losses/preference/test_flexible_betas.py::test_equals_numpy",
            "tests/losses/preference/test_flexible_betas.py::test_equal_betas_are_dpo",
        ),
        "claim": ("tests/losses/preference/test_flexible_betas.py::test_rejected_falls_slower_at_an_equal_margin",),
    },
    deviations=("The equation is recalled; that it has two betas and a likelihood term is checked.",),
    experiments=(
        Experiment(
            "trimtab.studies.preferences:pairs",
            "loss=dpo",
            "loss=flex-dpo",
            metric="rejected_log_prob",
            higher_is_better=True,
            mechanism="reward",
            outcome="better: -15.7 to -4.47, difference 11.3 (95 % interval 8.09 to 14.5), n=5; reward 1.81 to 1.02",
        ),
    ),
)
