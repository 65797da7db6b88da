"""Direct Nash optimisation: regression of the policy on general preferences, which need not come from any reward.

Each round t regresses the policy's implied preference between responses of pi_t on that of their win rates
r_t(y) = E[P(y beats y')], y' from pi_t:

    h    = eta [ (log pi(y_1) - log pi_t(y_1)) - (log pi(y_2) - log pi_t(y_2)) ]
    q    = sigmoid(r_t(y_1) - r_t(y_2))
    loss = -q log sigmoid(h) - (1 - q) log sigmoid(-h)

whose minimiser is pi_t exp(r_t / eta) / Z: iterated, a soft policy iteration towards the Nash equilibrium of the
preferences. Rosset et al. 2024 (arXiv:2404.03715), algorithm 1. The practical form, DNO-Prct, takes only pairs with a
large margin and sets q = 1: DPO with pi_t as the reference, anew in each round.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from trimtab.card import Card, Default, Experiment, Paper
from trimtab.errors import UsageError
from trimtab.losses._reduction import reduce
from trimtab.losses.preference._pairs import check_number, log_probabilities

__all__ = ["dno_loss"]


def dno_loss(
    policy_first: Tensor,
    policy_second: Tensor,
    last_first: Tensor,
    last_second: Tensor,
    *,
    win_rate_first: Tensor | None = None,
    win_rate_second: Tensor | None = None,
    eta: float = 0.1,
    reduction: str = "mean",
    denominator: float | Tensor | None = None,
) -> Tensor:
    """Return -q log sigmoid(h) - (1 - q) log sigmoid(-h), h the difference of log-ratios to the last policy.

    Args:
        policy_first: log pi(y_1), [B], sums over tokens.
        policy_second: log pi(y_2), [B].
        last_first: log pi_t(y_1), [B], under the policy that this round began with.
        last_second: log pi_t(y_2), [B].
        win_rate_first: r_t(y_1), [B], in [0, 1], against responses of pi_t; without both the first response is
            the preferred one and q is 1 (DNO-Prct).
        win_rate_second: r_t(y_2), [B].
        eta: strength of the pull to the last policy, above 0.
        reduction: `"mean"`, `"sum"` or `"none"`.
        denominator: what the mean divides by in place of the number of pairs.

    Returns:
        A scalar, or [B] with reduction `"none"`, in float32 or better.

    Raises:
        UsageError: if an argument breaks its rule, or only one win rate is given.

    Example:
        >>> zero, rate = torch.zeros(1), torch.tensor([0.7])
        >>> round(float(dno_loss(zero, zero, zero, zero, win_rate_first=rate, win_rate_second=rate)), 4)
        0.6931

    References:
        Rosset et al. 2024, arXiv:2404.03715, algorithms 1 and 2.
    """
    check_number("eta", eta, 0, open_low=True)
    if (win_rate_first is None) != (win_rate_second is None):
        raise UsageError("win rates come in pairs: give win_rate_first and win_rate_second, or neither.")
    pi_1, pi_2, last_1, last_2 = log_probabilities(
        policy_first=policy_first, policy_second=policy_second, last_first=last_first, last_second=last_second
    )
    margin = eta * ((pi_1 - last_1) - (pi_2 - last_2))
    if win_rate_first is None or win_rate_second is None:
        return reduce(-F.logsigmoid(margin), None, reduction, denominator)
    rates = {"win_rate_first": win_rate_first, "win_rate_second": win_rate_second}
    for name, rate in rates.items():
        if rate.shape != pi_1.shape or not bool(((rate >= 0) & (rate <= 1)).all()):
            raise UsageError(f"{name} must hold a rate in [0, 1] for each pair, of shape {tuple(pi_1.shape)}.")
    target = torch.sigmoid((win_rate_first - win_rate_second).detach().to(pi_1.dtype))
    values = -target * F.logsigmoid(margin) - (1 - target) * F.logsigmoid(-margin)
    return reduce(values, None, reduction, denominator)


CARD = Card(
    name="dno",
    room="losses",
    summary="regression on win rates against the last policy, round by round, towards the Nash policy",
    paper=Paper(
        "Direct Nash Optimization: Teaching Language Models to Self-Improve with General Preferences",
        2024,
        arxiv="2404.03715",
    ),
    equation="loss = -q log sigmoid(h) - (1 - q) log sigmoid(-h), q = sigmoid(r_t(y_1) - r_t(y_2))",
    claim="Improves monotonically over rounds with preferences that no reward explains; 7B beats GPT-4-Turbo in 33 %.",
    acts_on="loss",
    entry="trimtab.losses.preference.nash_preference:dno_loss",
    defaults=(
        Default("eta", 0.1, "ours: DPO's beta"),
        Default("reduction", "mean", "paper: an expectation over pairs"),
    ),
    verified={
        "equation": (
            "tests/losses/preference/test_nash_preference.py::test_equals_numpy",
            "tests/losses/preference/test_nash_preference.py::test_without_win_rates_it_is_dpo",
            "tests/losses/preference/test_nash_preference.py::test_minimiser_is_one_step_of_policy_iteration",
        ),
        "reference": ("tests/losses/preference/test_trl_reference.py::test_losses_of_scores_equal_dpo_trainer",),
        "claim": ("tests/losses/preference/test_nash_preference.py::test_cyclic_preferences_lead_to_the_nash_mixture",),
    },
    deviations=(
        "Algorithm 1 is recalled; its minimiser, which the paper derives it from, is tested.",
        "Sampling, judging and the choice of pairs with a large margin are the training loop's.",
    ),
    experiments=(
        Experiment(
            "trimtab.studies.preferences:rounds",
            "loss=dpo",
            "loss=dno",
            metric="exploitability",
            mechanism="last_exploitability",
            outcome=(
                "no evidence: 0.0317 to 0.0216, difference -0.0101 (95 % interval -0.0422 to 0.022), n=5; last "
                "exploitability 0.306 to 0.156"
            ),
        ),
    ),
)
