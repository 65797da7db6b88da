"""SimPO: a reference-free logistic loss on mean log-probabilities a token, with a target margin.

    h    = beta log pi(y_w) / |y_w| - beta log pi(y_l) / |y_l| - gamma
    loss = -log sigmoid(h)

Meng, Xia and Chen 2024 (arXiv:2405.14734), equation 6.
"""

from __future__ import annotations

from torch import Tensor

from trimtab.card import Card, Default, Experiment, Paper
from trimtab.losses._reduction import reduce
from trimtab.losses.preference._pairs import check_number, lengths, log_probabilities, logistic

__all__ = ["simpo_loss"]


def simpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    *,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    beta: float = 2.0,
    gamma: float = 1.0,
    reduction: str = "mean",
    denominator: float | Tensor | None = None,
) -> Tensor:
    """Return -log sigmoid(beta log pi(y_w) / |y_w| - beta log pi(y_l) / |y_l| - gamma).

    Args:
        policy_chosen: log pi(y_w), [B], sums over tokens.
        policy_rejected: log pi(y_l), [B].
        chosen_lengths: |y_w|, tokens, [B], above 0.
        rejected_lengths: |y_l|, [B], above 0.
        beta: scale of the mean log-probabilities, above 0.
        gamma: target margin, at least 0.
        reduction: `"mean"`, `"sum"` or `"none"`.
        denominator: what the mean divides by in place of the number of pairs.

    Returns:
        A scalar, or [B] with reduction `"none"`, in float32 or better.

    Raises:
        UsageError: if an argument breaks its rule.

    Example:
        >>> import torch
        >>> sums, tokens = torch.tensor([-6.0]), torch.tensor([3])
        >>> round(float(simpo_loss(sums, sums, chosen_lengths=tokens, rejected_lengths=tokens)), 4)  # log(1 + e)
        1.3133

    References:
        Meng et al. 2024, arXiv:2405.14734, equation 6 (https://github.com/princeton-nlp/SimPO).
    """
    check_number("beta", beta, 0, open_low=True)
    check_number("gamma", gamma, 0)
    pi_w, pi_l = log_probabilities(policy_chosen=policy_chosen, policy_rejected=policy_rejected)
    long_w, long_l = lengths(pi_w, chosen_lengths=chosen_lengths, rejected_lengths=rejected_lengths)
    return reduce(logistic(beta * (pi_w / long_w - pi_l / long_l) - gamma, 0.0), None, reduction, denominator)


CARD = Card(
    name="simpo",
    room="losses",
    summary="a reference-free loss on log-probabilities a token, with a target margin",
    paper=Paper(
        "SimPO: Simple Preference Optimization with a Reference-Free Reward",
        2024,
        arxiv="2405.14734",
        code="https://github.com/princeton-nlp/SimPO",
    ),
    equation="loss = -log sigmoid(beta log pi(y_w) / |y_w| - beta log pi(y_l) / |y_l| - gamma)",
    claim="Beats DPO on instruction following without a reference model, and without longer responses.",
    acts_on="loss",
    entry="trimtab.losses.preference.simple_preference:simpo_loss",
    defaults=(
        Default("beta", 2.0, "paper: 2.0 to 2.5 (recalled)"),
        Default("gamma", 1.0, "paper: 0.5 to 1.5 (recalled)"),
        Default("reduction", "mean", "paper: an expectation over pairs"),
    ),
    verified={
        "equation": ("tests/losses/preference/test_simple_preference.py::test_equals_numpy",),
        "reference": (
            "tests/losses/preference/test_trl_reference.py::test_cpo_and_simpo_equal_cpo_trainer_on_scores",
            "tests/losses/preference/test_trl_reference.py::"
            "test_simpo_of_a_model_equals_cpo_trainer_without_its_likelihood",
        ),
    },
    deviations=(
        "TRL's 'simpo' adds a likelihood term unless its cpo_alpha is 0; here there is none, as in the paper.",
    ),
    experiments=(
        Experiment(
            "trimtab.studies.preferences:pairs",
            "loss=dpo,lr=0.01",
            "loss=simpo,lr=0.01",
            metric="reward",
            higher_is_better=True,
            mechanism="letters",
            outcome=(
                "no evidence: 2.19 to 2.38, difference 0.192 (95 % interval -0.157 to 0.542), n=5; letters 3.73 to 3.69"
            ),
        ),
    ),
)
