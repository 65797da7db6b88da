"""Unlikelihood training: likelihood for tokens of good text, unlikelihood for those of bad text.

    loss = -log pi(y_i) on good tokens, -alpha log(1 - pi(y_i)) on bad ones

Welleck et al. 2019 (arXiv:1908.04319), as one of the objectives of Korbak et al. 2023 (arXiv:2302.08582); authors' code
tomekkorbak/pretraining-with-human-feedback, apo/objectives.py.

Shape suffixes: B sequences, L positions, V classes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trimtab.card import Card, Default, Experiment, Paper
from trimtab.losses._reduction import reduce
from trimtab.losses._stable import log1mexp
from trimtab.losses.preference._pairs import check_number
from trimtab.losses.tuning._tokens import check_mask, token_log_probs

__all__ = ["unlikelihood_loss"]


def unlikelihood_loss(
    logits: Tensor,
    targets: Tensor,
    bad: Tensor,
    *,
    alpha: float = 1.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    denominator: float | Tensor | None = None,
) -> Tensor:
    """Return -log pi(y_i) on good tokens and -alpha log(1 - pi(y_i)) on bad ones.

    Args:
        logits: [B, L, V].
        targets: [B, L], class indices.
        bad: which targets are bad, boolean, [B, L]; with none it is plain training.
        alpha: weight of the bad tokens, at least 0; at 0 it trains on the good ones only.
        ignore_index: target that does not count.
        reduction: `"mean"` over the targets that count, good and bad, `"sum"` or `"none"`.
        denominator: what the mean divides by in place of the number of targets that count.

    Returns:
        A scalar, or [B, L] with reduction `"none"`, in float32 or better.

    Raises:
        UsageError: if an argument breaks its rule.

    Example:
        >>> logits, targets = torch.zeros(1, 2, 4), torch.tensor([[0, 1]])
        >>> loss = unlikelihood_loss(logits, targets, torch.tensor([[False, True]]), reduction="none")
        >>> [round(value, 4) for value in loss[0].tolist()]  # log 4, log(4 / 3)
        [1.3863, 0.2877]

    References:
        Welleck et al. 2019, arXiv:1908.04319, equation 4; Korbak et al. 2023, arXiv:2302.08582, section 2.
    """
    check_number("alpha", alpha, 0)
    log_probs, valid = token_log_probs(logits, targets, ignore_index)
    unwanted = check_mask("bad", bad, targets.shape)
    values = torch.where(unwanted, -alpha * log1mexp(log_probs), -log_probs)
    return reduce(values, valid, reduction, denominator)


CARD = Card(
    name="unlikelihood",
    room="losses",
    summary="likelihood for good tokens and unlikelihood for bad ones",
    paper=Paper("Neural Text Generation with Unlikelihood Training", 2019, arxiv="1908.04319"),
    equation="loss = -log p on good tokens, -alpha log(1 - p) on bad ones",
    claim="Less repetition and fewer unwanted tokens at the perplexity of plain training.",
    acts_on="loss",
    entry="trimtab.losses.tuning.unlikelihood_training:unlikelihood_loss",
    defaults=(
        Default("alpha", 1.0, "Welleck et al. 2019 (recalled); Korbak et al. 2023 search it"),
        Default("reduction", "mean", "Korbak et al.'s code: over all tokens"),
        Default("ignore_index", -100, "torch.nn.functional.cross_entropy"),
    ),
    verified={
        "equation": (
            "tests/losses/tuning/test_unlikelihood_training.py::test_equals_numpy",
            "tests/losses/tuning/test_unlikelihood_training.py::test_without_bad_tokens_it_is_plain_training",
            "tests/losses/tuning/test_contract.py::test_micro_batches_add_up",
        ),
    },
    deviations=(
        "Bad tokens are given as a mask: Welleck et al. take the tokens that came before, Korbak et al. those whose "
        "score is above a threshold. 1 - p is bounded below by one rounding step, in the latter's code by 1e-20.",
    ),
    experiments=(
        Experiment(
            "trimtab.studies.fine_tuning:preferences",
            "method=plain",
            "method=unlikelihood",
            metric="bad_rate",
            mechanism="clean_loss",
            outcome=(
                "better: bad words 7.7 % to 0.05 %, difference -7.7 points (95 % interval -8.2 to -7.2), n=5; "
                "loss of clean texts 1.656 to 1.612, -0.044 (-0.054 to -0.035)"
            ),
        ),
    ),
)
