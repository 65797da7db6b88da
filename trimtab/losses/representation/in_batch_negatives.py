"""Multiple negatives ranking: each anchor picks its own positive among those of the whole batch.

    loss_i = -log( exp(c S(a_i, p_i)) / sum_j exp(c S(a_i, p_j)) )

The other anchors' positives are the negatives, at no cost of their own; further (hard) negatives can join them. S is a
dot product with c = 1 in Henderson et al. 2017 (arXiv:1705.00652), section 4; with cosines and c = 20 it is the loss of
that name in sentence-transformers, and InfoNCE with temperature 1 / c. The symmetric form also lets each positive pick
its anchor. The gradient in the matrix of scores is c (softmax(c S) - I) / B.

Shape suffixes: B pairs, C candidates, D embedding, M further negatives.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from trimtab.card import Card, Default, Experiment, Paper
from trimtab.errors import UsageError, choose
from trimtab.losses.preference._pairs import check_number
from trimtab.losses.representation._contrast import check_rows, info_nce, similarities
from trimtab.losses.representation._ranks import gather_over_ranks, reduce_over_ranks

__all__ = ["multiple_negatives_ranking_loss"]

_SCALES = {"dot": 1.0, "cosine": 20.0}


def multiple_negatives_ranking_loss(
    anchors: Tensor,
    positives: Tensor,
    negatives: Tensor | None = None,
    *,
    similarity: str = "dot",
    scale: float | None = None,
    symmetric: bool = False,
    all_ranks: bool = False,
    group: dist.ProcessGroup | None = None,
    reduction: str = "mean",
    denominator: float | Tensor | None = None,
) -> Tensor:
    """Return the cross-entropy of each anchor's positive among all candidates of the batch.

    The loss depends on the batch as a whole: `cached_contrastive_step` computes its gradient in micro-batches.

    Args:
        anchors: [B, D], of messages or questions.
        positives: [B, D], of their responses, in the same order; no two pairs should be duplicates.
        negatives: [M, D], further responses that are wrong for all anchors.
        similarity: `"dot"` (the paper's) or `"cosine"`.
        scale: c, above 0; None for 1 with dot products and 20 with cosines.
        symmetric: whether anchors are also ranked for each positive; the mean of both directions.
        all_ranks: whether candidates are gathered from all ranks; the mean (or sum) is then over the pairs of all
            ranks, and gradients are right once they are averaged over ranks, as DistributedDataParallel does.
        group: the process group of `all_ranks`.
        reduction: `"mean"` over the pairs, `"sum"` or `"none"`.
        denominator: what the mean divides by in place of the number of pairs.

    Returns:
        A scalar, or [B] with reduction `"none"`, in float32 or better. Without pairs it is 0.

    Raises:
        UsageError: if an argument breaks its rule.

    Example:
        >>> anchors = torch.eye(3)
        >>> loss = multiple_negatives_ranking_loss(anchors, anchors, similarity="cosine", scale=1.0)
        >>> round(float(loss), 4)  # log(1 + 2 / e)
        0.5514

    References:
        Henderson et al. 2017, arXiv:1705.00652, section 4.
    """
    choose("similarity", similarity, _SCALES)
    c = _SCALES[similarity] if scale is None else check_number("scale", scale, 0, open_low=True)
    further = {} if negatives is None else {"negatives": negatives}
    check_rows(anchors=anchors, positives=positives, **further)
    if len(anchors) != len(positives):
        raise UsageError(f"each anchor needs its positive, got {len(anchors)} anchors and {len(positives)} positives.")
    start, candidates, partners = 0, positives, anchors
    if all_ranks:
        candidates, start = gather_over_ranks(positives, group)
        if symmetric:
            partners, _ = gather_over_ranks(anchors, group)
        if negatives is not None:
            negatives, _ = gather_over_ranks(negatives, group)
    if negatives is not None:
        candidates = torch.cat([candidates, negatives.to(candidates.dtype)])

    def ranked(rows: Tensor, among: Tensor) -> Tensor:
        scores_BC = c * similarities(rows, among, cosine=similarity == "cosine")
        own_B = torch.arange(start, start + len(rows), device=rows.device)
        own_BC = own_B.unsqueeze(-1) == torch.arange(len(among), device=rows.device)
        return info_nce(scores_BC, own_BC)[0]

    values_B = ranked(anchors, candidates)
    if symmetric:
        values_B = (values_B + ranked(positives, partners)) / 2
    return reduce_over_ranks(values_B, None, reduction, denominator, all_ranks=all_ranks, group=group)


CARD = Card(
    name="multiple-negatives-ranking",
    room="losses",
    summary="cross-entropy of each anchor's positive among the positives of the whole batch",
    paper=Paper("Efficient Natural Language Response Suggestion for Smart Reply", 2017, arxiv="1705.00652"),
    equation="loss_i = -log( exp(c S(a_i, p_i)) / sum_j exp(c S(a_i, p_j)) )",
    claim="Reaches the quality of sequence-to-sequence models at a small fraction of computation and latency.",
    acts_on="loss",
    entry="trimtab.losses.representation.in_batch_negatives:multiple_negatives_ranking_loss",
    defaults=(
        Default("similarity", "dot", "paper (recalled): S = h_x^T h_y"),
        Default("scale", None, "1 for dot products (paper), 20 for cosines (sentence-transformers)"),
        Default("symmetric", False, "paper"),
    ),
    verified={
        "equation": (
            "tests/losses/representation/test_in_batch_negatives.py::test_equals_numpy",
            "tests/losses/representation/test_in_batch_negatives.py::test_gradient_is_the_matrix_form",
            "tests/losses/representation/test_in_batch_negatives.py::test_gradcheck",
            "tests/losses/representation/test_in_batch_negatives.py::test_ranks_equal_the_single_process",
        ),
        "reference": (
            "tests/losses/representation/test_in_batch_negatives.py::"
            "test_is_the_cross_entropy_of_scores_with_diagonal_labels",
            "tests/losses/representation/test_sentence_transformers_reference.py::test_equals_sentence_transformers",
        ),
    },
    deviations=(
        "Cosines, a scale, further negatives, the symmetric form and gathering over ranks are additions; scale and "
        "cosines are those of the loss of this name in sentence-transformers, whose default they are.",
        "With gathering, the value is that of all ranks' anchors on every rank, for gradients that are averaged; "
        "sentence-transformers gives each rank the mean of its own anchors, which is the same for equal batches.",
        "The paper's joint use of hand-crafted features and hierarchical responses is no part of the loss.",
    ),
    experiments=(
        Experiment(
            "trimtab.studies.contrastive:halves",
            "group=8,lr=0.003",
            "group=64,lr=0.001",
            metric="recall",
            higher_is_better=True,
            mechanism="negatives",
            outcome=(
                "no evidence here that more negatives help at equal pairs: recall@1 14.2 % to 15.2 %, difference "
                "1.0 points (95 % interval -0.3 to 2.4), n=5, each arm at its own best learning rate; negatives 7 "
                "to 63"
            ),
        ),
    ),
)
