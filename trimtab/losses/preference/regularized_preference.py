"""Regularised preference optimisation: DPO with a likelihood term that stands for pessimism about the reward.

    loss = -log sigmoid(beta [log-ratio of y_w - log-ratio of y_l]) - eta beta log pi(y_0),   y_0 from a baseline policy

Choosing the policy that is best for the least favourable reward among those that explain the data gives DPO plus
imitation of a baseline, such as the chosen responses: responses that no pair covers are not pushed up. Liu et al. 2024
(arXiv:2405.16436).
"""

from __future__ import annotations

from torch import Tensor

from trimtab.card import Card, Default, Experiment, Paper
from trimtab.losses._reduction import reduce
from trimtab.losses.preference._pairs import check_number, lengths, log_probabilities, logistic

__all__ = ["rpo_loss"]


def rpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    *,
    policy_baseline: Tensor | None = None,
    baseline_lengths: Tensor | None = None,
    beta: float = 0.1,
    eta: float = 0.005,
    reduction: str = "mean",
    denominator: float | Tensor | None = None,
) -> Tensor:
    """Return the loss of DPO - eta beta log pi(y_0).

    Args:
        policy_chosen: log pi(y_w), [B], sums over tokens.
        policy_rejected: log pi(y_l), [B].
        ref_chosen: log ref(y_w), [B].
        ref_rejected: log ref(y_l), [B].
        policy_baseline: log pi(y_0), [B], of responses from the baseline policy; default the chosen responses.
        baseline_lengths: tokens of y_0, [B]; where given, the likelihood is a mean over them.
        beta: strength of the pull to the reference, above 0.
        eta: weight of the regulariser, at least 0; at 0 it is DPO.
        reduction: `"mean"`, `"sum"` or `"none"`.
        denominator: what the mean divides by in place of the number of pairs.

    Returns:
        A scalar, or [B] with reduction `"none"`, in float32 or better.

    Raises:
        UsageError: if an argument breaks its rule.

    Example:
        >>> import torch
        >>> scores = torch.tensor([-10.0])
        >>> round(float(rpo_loss(scores, scores, scores, scores, eta=1.0)), 4)  # log 2 + 0.1 * 10
        1.6931

    References:
        Liu et al. 2024, arXiv:2405.16436, algorithm 2 (https://github.com/YSLIU627/Regularized-Preference-Optimization).
    """
    check_number("beta", beta, 0, open_low=True)
    check_number("eta", eta, 0)
    pi_w, pi_l, ref_w, ref_l, pi_0 = log_probabilities(
        policy_chosen=policy_chosen,
        policy_rejected=policy_rejected,
        ref_chosen=ref_chosen,
        ref_rejected=ref_rejected,
        policy_baseline=policy_chosen if policy_baseline is None else policy_baseline,
    )
    if baseline_lengths is not None:
        pi_0 = pi_0 / lengths(pi_0, baseline_lengths=baseline_lengths)[0]
    margin = beta * ((pi_w - ref_w) - (pi_l - ref_l))
    return reduce(logistic(margin, 0.0) - eta * beta * pi_0, None, reduction, denominator)


CARD = Card(
    name="rpo",
    room="losses",
    summary="DPO with imitation of a baseline, which keeps mass from responses that no pair covers",
    paper=Paper(
        "Provably Mitigating Overoptimization in RLHF: Your SFT Loss is Implicitly an Adversarial Regularizer",
        2024,
        arxiv="2405.16436",
        code="https://github.com/YSLIU627/Regularized-Preference-Optimization",
    ),
    equation="loss = DPO - eta beta log pi(y_0), y_0 from a baseline policy",
    claim="Mitigates over-optimisation with a guarantee under partial coverage, and improves on DPO in alignment.",
    acts_on="loss",
    entry="trimtab.losses.preference.regularized_preference:rpo_loss",
    treats={"chosen-likelihood-drop": 2},
    defaults=(
        Default("beta", 0.1, "ours: DPO's"),
        Default("eta", 0.005, "paper, section 6 (recalled)"),
        Default("reduction", "mean", "paper: an expectation"),
    ),
    verified={
        "equation": (
            "tests/losses/preference/test_regularized_preference.py::test_equals_numpy",
            "tests/losses/preference/test_regularized_preference.py::test_eta_0_is_dpo",
        ),
        "reference": (
            "tests/losses/preference/test_trl_reference.py::"
            "test_rpo_alpha_is_iterative_rpo_with_a_mean_over_all_tokens_of_the_batch",
        ),
        "claim": ("tests/losses/preference/test_regularized_preference.py::test_unseen_arm_gets_mass_from_dpo_only",),
    },
    deviations=(
        "The authors' code has one coefficient in place of eta beta, and a likelihood that is a mean over tokens: give "
        "baseline_lengths and eta = coefficient / beta for it.",
    ),
    experiments=(
        Experiment(
            "trimtab.studies.preferences:pairs",
            "loss=dpo,lr=0.01,uncovered=true",
            "loss=rpo,lr=0.01,uncovered=true",
            metric="uncovered",
            mechanism="reward",
            outcome=(
                "no evidence: 0.0788 to 0.0603, difference -0.0185 (95 % interval -0.0665 to 0.0294), n=5; "
                "reward 1.82 to 1.83"
            ),
        ),
    ),
)
