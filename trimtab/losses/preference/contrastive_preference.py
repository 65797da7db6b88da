"""Contrastive preference optimisation: DPO without a reference, held by the likelihood of the chosen response.

    loss = -log sigmoid(beta [log pi(y_w) - log pi(y_l)]) - nll_weight log pi(y_w)

Xu et al. 2024 (arXiv:2401.08417), equation 5: DPO with a uniform reference, and a likelihood term with weight 1.
"""

from __future__ import annotations

from torch import Tensor

from trimtab.card import Card, Default, Experiment, Paper
from trimtab.losses._reduction import reduce
from trimtab.losses.preference._pairs import check_number, lengths, log_probabilities, logistic

__all__ = ["cpo_loss"]


def cpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    *,
    chosen_lengths: Tensor | None = None,
    beta: float = 0.1,
    nll_weight: float = 1.0,
    reduction: str = "mean",
    denominator: float | Tensor | None = None,
) -> Tensor:
    """Return -log sigmoid(beta [log pi(y_w) - log pi(y_l)]) - nll_weight log pi(y_w).

    Args:
        policy_chosen: log pi(y_w), [B], sums over tokens.
        policy_rejected: log pi(y_l), [B].
        chosen_lengths: [B]; where given, the likelihood term is a mean over each response's tokens.
        beta: scale of the margin, above 0.
        nll_weight: of the likelihood term, at least 0.
        reduction: `"mean"`, `"sum"` or `"none"`.
        denominator: what the mean divides by in place of the number of pairs.

    Returns:
        A scalar, or [B] with reduction `"none"`, in float32 or better.

    Raises:
        UsageError: if an argument breaks its rule.

    Example:
        >>> import torch
        >>> scores = torch.tensor([-2.0])
        >>> round(float(cpo_loss(scores, scores)), 4)  # log 2 + 2
        2.6931

    References:
        Xu et al. 2024, arXiv:2401.08417, equation 5 (https://github.com/fe1ixxu/ALMA).
    """
    check_number("beta", beta, 0, open_low=True)
    check_number("nll_weight", nll_weight, 0)
    pi_w, pi_l = log_probabilities(policy_chosen=policy_chosen, policy_rejected=policy_rejected)
    likelihood = pi_w if chosen_lengths is None else pi_w / lengths(pi_w, chosen_lengths=chosen_lengths)[0]
    return reduce(logistic(beta * (pi_w - pi_l), 0.0) - nll_weight * likelihood, None, reduction, denominator)


CARD = Card(
    name="cpo",
    room="losses",
    summary="DPO without a reference model, with a likelihood term on the chosen response",
    paper=Paper(
        "Contrastive Preference Optimization: Pushing the Boundaries of LLM Performance in Machine Translation",
        2024,
        arxiv="2401.08417",
        code="https://github.com/fe1ixxu/ALMA",
    ),
    equation="loss = -log sigmoid(beta [log pi(y_w) - log pi(y_l)]) - log pi(y_w)",
    claim="Lifts a translation model beyond what fine-tuning on its references reaches, at less memory than DPO.",
    acts_on="loss",
    entry="trimtab.losses.preference.contrastive_preference:cpo_loss",
    defaults=(
        Default("beta", 0.1, "paper, section 4.1"),
        Default("nll_weight", 1.0, "paper, equation 5"),
        Default("reduction", "mean", "paper: an expectation over pairs"),
    ),
    verified={
        "equation": ("tests/losses/preference/test_contrastive_preference.py::test_equals_numpy",),
        "reference": (
            "tests/losses/preference/test_trl_reference.py::test_cpo_and_simpo_equal_cpo_trainer_on_scores",
            "tests/losses/preference/test_trl_reference.py::"
            "test_cpo_of_a_model_equals_cpo_trainer_with_a_mean_over_all_tokens_of_the_batch",
        ),
    },
    deviations=(
        "The authors' code and TRL take the likelihood term as one mean over all tokens of the batch: give the batch's "
        "mean length as chosen_lengths for it. With each response's own length it is a mean over its tokens.",
    ),
    experiments=(
        Experiment(
            "trimtab.studies.preferences:pairs",
            "loss=sft,lr=0.01",
            "loss=cpo,lr=0.01",
            metric="reward",
            higher_is_better=True,
            mechanism="kl",
            outcome=(
                "better: 0.472 to 0.514, difference 0.0415 (95 % interval 0.0362 to 0.0469), n=5; kl 0.447 to 0.496"
            ),
        ),
    ),
)
