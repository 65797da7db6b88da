"""Kahneman-Tversky optimisation: single responses, each good or bad, without pairs.

    r     = log pi(y) - log ref(y)
    z     = max(0, mean over mismatched (x', y) of log pi(y | x') - log ref(y | x')),  no gradient
    v     = lambda_D sigmoid(beta (r - z))   where y is desirable
            lambda_U sigmoid(beta (z - r))   where it is not
    loss  = lambda - v

Ethayarajh et al. 2024 (arXiv:2402.01306), equation 8.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trimtab.card import Card, Default, Experiment, Paper
from trimtab.errors import UsageError
from trimtab.losses._reduction import reduce
from trimtab.losses.preference._pairs import check_number, log_probabilities

__all__ = ["kto_loss"]


def kto_loss(
    policy: Tensor,
    ref: Tensor,
    desirable: Tensor,
    *,
    kl: float | Tensor = 0.0,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    reduction: str = "mean",
    denominator: float | Tensor | None = None,
) -> Tensor:
    """Return lambda_y - lambda_y sigmoid(+-beta (log pi(y) - log ref(y) - z)).

    Args:
        policy: log pi(y), [B], sums over tokens.
        ref: log ref(y), [B].
        desirable: which responses are good, boolean, [B].
        kl: the reference point before the clamp at 0: the mean over responses that were paired with other prompts of
            log pi - log ref. A scalar, the same for the whole batch: with several ranks or micro-batches, their mean.
        beta: how fast value saturates, above 0.
        desirable_weight: lambda_D, at least 0.
        undesirable_weight: lambda_U, at least 0.
        reduction: `"mean"`, `"sum"` or `"none"`.
        denominator: what the mean divides by in place of the number of responses.

    Returns:
        A scalar, or [B] with reduction `"none"`, in float32 or better.

    Raises:
        UsageError: if an argument breaks its rule.

    Example:
        >>> zero = torch.zeros(2)
        >>> float(kto_loss(zero, zero, torch.tensor([True, False])))  # 1 - sigmoid(0)
        0.5

    References:
        Ethayarajh et al. 2024, arXiv:2402.01306, equation 8 (https://github.com/ContextualAI/HALOs).
    """
    check_number("beta", beta, 0, open_low=True)
    check_number("desirable_weight", desirable_weight, 0)
    check_number("undesirable_weight", undesirable_weight, 0)
    pi, reference = log_probabilities(policy=policy, ref=ref)
    if desirable.dtype != torch.bool or desirable.shape != pi.shape:
        raise UsageError(
            f"desirable must be boolean of shape {tuple(pi.shape)}, got {desirable.dtype} of {tuple(desirable.shape)}."
        )
    point = torch.as_tensor(kl, dtype=pi.dtype, device=pi.device).detach().clamp(min=0)
    if point.dim():
        raise UsageError(f"kl must be one number for the whole batch, got shape {tuple(point.shape)}: give its mean.")
    gain = beta * (pi - reference - point)
    good = desirable_weight * (1 - torch.sigmoid(gain))
    bad = undesirable_weight * (1 - torch.sigmoid(-gain))
    return reduce(torch.where(desirable, good, bad), None, reduction, denominator)


CARD = Card(
    name="kto",
    room="losses",
    summary="alignment from single responses that are good or bad, by a value function after prospect theory",
    paper=Paper(
        "KTO: Model Alignment as Prospect Theoretic Optimization",
        2024,
        arxiv="2402.01306",
        code="https://github.com/ContextualAI/HALOs",
    ),
    equation="loss = lambda_y - v, v = lambda_D sigmoid(beta (r - z)) | lambda_U sigmoid(beta (z - r))",
    claim="Matches or exceeds DPO from 1B to 30B parameters although it sees only whether a response is good.",
    acts_on="loss",
    entry="trimtab.losses.preference.kahneman_tversky:kto_loss",
    defaults=(
        Default("kl", 0.0, "ours: the value at the reference model, where the estimate is 0"),
        Default("beta", 0.1, "paper, section 4.2"),
        Default("desirable_weight", 1.0, "paper: lambda_D = 1"),
        Default("undesirable_weight", 1.0, "paper: lambda_U = 1"),
        Default("reduction", "mean", "paper: an expectation over responses"),
    ),
    verified={
        "equation": ("tests/losses/preference/test_kahneman_tversky.py::test_equals_numpy",),
        "reference": ("tests/losses/preference/test_trl_reference.py::test_kto_equals_kto_trainer",),
    },
    deviations=(
        "The reference point is an argument: how mismatched pairs are drawn is the training loop's. With the mean over "
        "them it is TRL's.",
    ),
    experiments=(
        Experiment(
            "trimtab.studies.preferences:pairs",
            "loss=dpo,lr=0.01",
            "loss=kto,lr=0.003",
            metric="reward",
            higher_is_better=True,
            mechanism="kl",
            outcome="worse: 2.19 to 1.36, difference -0.83 (95 % interval -1.5 to -0.16), n=5; kl 5.18 to 2.8",
        ),
    ),
)
