"""Future n-gram prediction: at each position, cross-entropy of the next n tokens, as ProphetNet is trained.

    loss = -sum_{j < n} alpha_j sum_t log p_j(y_{t+j} | y_{<t}) / T,   alpha_j = gamma^j / sum_i gamma^i

p_j is the distribution of stream j, which sees no more than stream 0 does. To predict further ahead keeps a model from
fitting local correlations alone; text is generated with stream 0. Qi et al. 2020 (arXiv:2001.04063).

Shape suffixes: N streams, B sequences, L positions, V classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trimtab.card import Card, Default, Experiment, Paper
from trimtab.errors import UsageError
from trimtab.losses._reduction import reduce
from trimtab.losses.preference._pairs import check_number
from trimtab.losses.tuning._tokens import token_log_probs

__all__ = ["future_ngram_loss"]


def future_ngram_loss(
    logits: Tensor | Sequence[Tensor],
    targets: Tensor,
    *,
    gamma: float = 1.0,
    aligned: bool = False,
    ignore_index: int = -100,
    reduction: str = "mean",
    denominator: float | Tensor | None = None,
) -> Tensor:
    """Return the weighted cross-entropy of the n tokens that follow each position.

    Args:
        logits: [N, B, L, V], or N tensors [B, L, V]; stream j at position t predicts `targets[:, t + j]`, and what it
            has no target for at the end of a row does not count.
        targets: [B, L], class indices, of the next token (stream 0's), as cross-entropy takes them.
        gamma: how the weights go on from one stream to the next, at least 0; at 0 only the next token counts.
        aligned: whether stream j at position t predicts `targets[:, t]` instead, as in the authors' model, whose
            streams are shifted inside.
        ignore_index: target that does not count.
        reduction: `"mean"` over the targets that count for stream 0, `"sum"` or `"none"`.
        denominator: what the mean divides by in place of the number of targets that count.

    Returns:
        A scalar, or [B, L] with reduction `"none"`, at the position that predicts, in float32 or better. With one
        stream it is cross-entropy.

    Raises:
        UsageError: if an argument breaks its rule.

    Example:
        >>> logits = torch.zeros(2, 1, 3, 4)
        >>> loss = future_ngram_loss(logits, torch.tensor([[0, 1, 2]]), reduction="none")
        >>> [round(value, 4) for value in loss[0].tolist()]  # log 4, log 4, and half of it where nothing follows
        [1.3863, 1.3863, 0.6931]

    References:
        Qi et al. 2020, arXiv:2001.04063, equation 3 (https://github.com/microsoft/ProphetNet).
    """
    check_number("gamma", gamma, 0)
    if len(logits) < 1 or targets.dim() != 2:
        raise UsageError(
            f"logits must hold one stream or more and targets be [B, L], got {len(logits)} and {tuple(targets.shape)}."
        )
    total = sum(gamma**j for j in range(len(logits)))
    valid = targets != ignore_index
    values: Tensor | None = None
    for j, stream in enumerate(logits):
        shifted = targets
        if j and not aligned:
            end = torch.full_like(targets[:, :j], ignore_index)
            shifted = torch.cat([targets[:, j:], end], 1)[:, : targets.shape[1]]
        log_probs, _ = token_log_probs(stream, shifted, ignore_index)
        term = -(gamma**j / total) * log_probs
        values = term if values is None else values + term
    if values is None:
        raise UsageError("logits must hold one stream or more.")
    if reduction == "mean" and denominator is None:
        denominator = valid.sum().clamp(min=1)
    # Not masked again: a position whose own target does not count may predict one further on that does.
    return reduce(values, None, reduction, denominator)


CARD = Card(
    name="future-ngram",
    room="losses",
    summary="cross-entropy of the next n tokens at each position, with weights that fall from one to the next",
    paper=Paper(
        "ProphetNet: Predicting Future N-gram for Sequence-to-Sequence Pre-training",
        2020,
        arxiv="2001.04063",
        code="https://github.com/microsoft/ProphetNet",
    ),
    equation="loss = -sum_j alpha_j sum_t log p_j(y_(t+j) | y_<t), alpha_j = gamma^j / sum_i gamma^i",
    claim="Better abstractive summaries and questions than next-token pre-training on the same data.",
    acts_on="loss",
    entry="trimtab.losses.generation.future_ngram:future_ngram_loss",
    defaults=(
        Default("gamma", 1.0, "authors' code: streams weigh alike; the paper's power law is recalled"),
        Default("aligned", False, "ours: heads on one state need no shift inside the model"),
        Default("reduction", "mean", "authors' code, ngram_criterions.py"),
        Default("ignore_index", -100, "torch.nn.functional.cross_entropy"),
    ),
    verified={
        "equation": (
            "tests/losses/generation/test_future_ngram.py::test_equals_a_plain_loop",
            "tests/losses/generation/test_future_ngram.py::test_one_stream_is_cross_entropy",
            "tests/losses/generation/test_future_ngram.py::test_streams_see_only_their_own_targets",
            "tests/losses/generation/test_future_ngram.py::TestOneStream::test_micro_batches_add_up",
        ),
        "reference": ("tests/losses/generation/test_future_ngram.py::test_equals_transformers",),
    },
    deviations=(
        "The n-stream attention, with which ProphetNet computes its streams, is the model's: any n heads will do.",
        "A mean divides by the targets of stream 0; the authors' by those of all streams, which is the same where they "
        "are aligned.",
    ),
    experiments=(
        Experiment(
            "trimtab.studies.generation:lookahead",
            "n=1",
            "n=2",
            metric="first_loss",
            mechanism="first_accuracy",
            outcome=(
                "no evidence here: loss of the token that needs a look ahead 0.095 to 0.140, difference +0.044 "
                "(95 % interval -0.002 to +0.091), n=5; accuracy 0.999 to 0.994, -0.006 (-0.015 to +0.003)"
            ),
        ),
    ),
)
