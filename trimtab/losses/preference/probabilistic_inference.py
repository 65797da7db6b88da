"""PMPO: preferences as probabilistic inference, from accepted and rejected responses that need not be paired.

    J = alpha E_accepted[log pi(y)] - (1 - alpha) E_rejected[log pi(y)] - beta KL(ref || pi);   loss = -J

Abdolmaleki et al. 2024 (arXiv:2410.04166). Only one kind of feedback is needed. With rejected responses alone, J has a
maximum only with the KL term: over single responses y it is pi(y) proportional to beta ref(y) - (1 - alpha) d(y), d the
share of y among the rejected, as long as that is above 0; without it the likelihood of y falls without end.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trimtab.card import Card, Default, Experiment, Paper
from trimtab.errors import UsageError
from trimtab.losses._reduction import check_logits, check_targets, reduce, working_dtype
from trimtab.losses.preference._pairs import check_number, log_probabilities

__all__ = ["pmpo_loss", "reference_kl"]


def pmpo_loss(
    policy: Tensor,
    kl: Tensor,
    accepted: Tensor,
    *,
    accepted_share: float = 0.5,
    alpha: float = 0.5,
    beta: float = 0.5,
    reduction: str = "mean",
    denominator: float | Tensor | None = None,
) -> Tensor:
    """Return -J, as the mean of one value a response.

    Args:
        policy: log pi(y), [B], sums over tokens.
        kl: KL(ref || pi) at each response's prompt, [B], with gradient (`reference_kl`).
        accepted: which responses are good, boolean, [B].
        accepted_share: share of accepted responses in the data, in [0, 1]: with it the mean over all responses is the
            sum of the means over either kind, whatever the batch holds. 1 or 0 if there is one kind only.
        alpha: weight of accepted against rejected responses, in [0, 1].
        beta: weight of the KL term, at least 0.
        reduction: `"mean"`, `"sum"` or `"none"`.
        denominator: what the mean divides by in place of the number of responses.

    Returns:
        A scalar, or [B] with reduction `"none"`, in float32 or better.

    Raises:
        UsageError: if an argument breaks its rule, or a kind of response is there whose share is 0.

    Example:
        >>> policy, kl = torch.tensor([-2.0, -3.0]), torch.zeros(2)
        >>> float(pmpo_loss(policy, kl, torch.tensor([True, False])))  # 0.5 * 2 - 0.5 * 3
        -0.5

    References:
        Abdolmaleki et al. 2024, arXiv:2410.04166, equation 10.
    """
    check_number("accepted_share", accepted_share, 0, 1)
    check_number("alpha", alpha, 0, 1)
    check_number("beta", beta, 0)
    pi, divergence = log_probabilities(policy=policy, kl=kl)
    if not isinstance(accepted, Tensor) or accepted.dtype != torch.bool or accepted.shape != pi.shape:
        raise UsageError(f"accepted must be boolean of shape {tuple(pi.shape)}: which responses are good.")
    if (accepted_share == 0 and bool(accepted.any())) or (accepted_share == 1 and not bool(accepted.all())):
        raise UsageError(f"accepted_share is {accepted_share:g}, but the batch holds a response of the other kind.")
    up = alpha / accepted_share if accepted_share else 0.0
    down = (1 - alpha) / (1 - accepted_share) if accepted_share < 1 else 0.0
    values = torch.where(accepted, -up * pi, down * pi) + beta * divergence
    return reduce(values, None, reduction, denominator)


def reference_kl(policy_logits: Tensor, ref_logits: Tensor, targets: Tensor, *, ignore_index: int = -100) -> Tensor:
    """Return KL(ref || pi) of each response, the sum over its positions of the exact KL of the next token.

    Args:
        policy_logits: [B, L, V].
        ref_logits: [B, L, V]; they get no gradient.
        targets: [B, L], int64, only to leave out the positions that are `ignore_index`.
        ignore_index: target that does not count.

    Returns:
        [B], in float32 or better.

    Raises:
        UsageError: if the shapes or dtypes do not fit.

    Example:
        >>> logits = torch.zeros(1, 2, 3)
        >>> float(reference_kl(logits, logits, torch.zeros(1, 2, dtype=torch.int64)))
        0.0
    """
    check_logits(policy_logits)
    check_logits(ref_logits)
    check_targets(policy_logits, targets)
    if ref_logits.shape != policy_logits.shape:
        raise UsageError(f"ref_logits must have shape {tuple(policy_logits.shape)}, got {tuple(ref_logits.shape)}.")
    valid = (targets != ignore_index).unsqueeze(-1)
    wide = torch.promote_types(working_dtype(policy_logits, None), working_dtype(ref_logits, None))
    # Zeroed before, not after: a position that does not count must not spoil the gradient of those that do.
    log_pi, log_ref = (
        torch.where(valid, logits.to(wide), torch.zeros_like(logits, dtype=wide)).log_softmax(-1)
        for logits in (policy_logits, ref_logits.detach())
    )
    return (log_ref.exp() * (log_ref - log_pi)).sum((-1, -2))


CARD = Card(
    name="pmpo",
    room="losses",
    summary="likelihood up for accepted and down for rejected responses, unpaired, held by KL to the reference",
    paper=Paper("Preference Optimization as Probabilistic Inference", 2024, arxiv="2410.04166"),
    equation="loss = -alpha E_accepted[log pi] + (1 - alpha) E_rejected[log pi] + beta KL(ref || pi)",
    claim="Learns from unpaired feedback, from accepted responses alone, and from rejected ones alone.",
    acts_on="loss",
    entry="trimtab.losses.preference.probabilistic_inference:pmpo_loss",
    defaults=(
        Default("accepted_share", 0.5, "ours: as many accepted as rejected responses"),
        Default("alpha", 0.5, "paper: both kinds alike (recalled)"),
        Default("beta", 0.5, "ours"),
        Default("reduction", "mean", "paper: expectations over either kind"),
    ),
    verified={
        "equation": (
            "tests/losses/preference/test_probabilistic_inference.py::test_equals_numpy",
            "tests/losses/preference/test_probabilistic_inference.py::test_reference_kl_equals_a_plain_loop",
        ),
        "claim": (
            "tests/losses/preference/test_probabilistic_inference.py::test_rejected_alone_end_at_the_analytical_policy",
            "tests/losses/preference/test_probabilistic_inference.py::test_rejected_alone_diverge_without_kl",
        ),
    },
    deviations=("The share of accepted responses is an argument, so that micro-batches add up to their batch.",),
    experiments=(
        Experiment(
            "trimtab.studies.preferences:pairs",
            "loss=none",
            "loss=pmpo-rejected",
            metric="reward",
            higher_is_better=True,
            mechanism="kl",
            outcome="better: -3.48e-09 to 1.23, difference 1.23 (95 % interval 0.339 to 2.13), n=5; kl 0 to 4.91",
        ),
    ),
)
