"""SupCL-Seq: supervised contrast between views of sequences that differ by their dropout alone.

    loss = mean_i -1 / |P(i)| sum_{p in P(i)} log( exp(z_i z_p / tau) / sum_{b != i} exp(z_i z_b / tau) )

i and b run over all views, and z are their embeddings, of length 1: one for each sample and each pass through the
encoder at a dropout probability of its own. P(i) are the other views of samples of i's class. After it, the encoder is
frozen or tuned with a linear classifier.

Sedghamiz et al. 2021 (arXiv:2109.07424); authors' code hooman650/SupCL-Seq. The loss is that of Khosla et al. 2020
(arXiv:2004.11362).

Shape suffixes: V views, B samples, N samples of all ranks, D embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trimtab.card import Card, Default, Experiment, Paper
from trimtab.errors import UsageError
from trimtab.losses.preference._pairs import check_number
from trimtab.losses.representation._contrast import info_nce, similarities
from trimtab.losses.representation._ranks import gather_over_ranks, reduce_over_ranks

__all__ = ["dropout_views", "supcl_seq_loss"]


def supcl_seq_loss(
    views: Tensor,
    labels: Tensor,
    *,
    temperature: float = 0.05,
    all_ranks: bool = False,
    group: dist.ProcessGroup | None = None,
    reduction: str = "mean",
    denominator: float | Tensor | None = None,
) -> Tensor:
    """Return the supervised contrastive loss of views of samples.

    Args:
        views: [V, B, D], of any length above 0: they are normalised here.
        labels: [B], classes; equal labels are positives.
        temperature: tau, above 0.
        all_ranks: whether views are contrasted with those of all ranks; gradients are then right once they are
            averaged over ranks.
        group: the process group of `all_ranks`.
        reduction: `"mean"` over the views that have a positive, `"sum"` or `"none"`.
        denominator: what the mean divides by in place of the number of views that have a positive.

    Returns:
        A scalar, or [V, B] with reduction `"none"`, in float32 or better. A view without any positive counts as little
        as no view at all: 0.

    Raises:
        UsageError: if an argument breaks its rule.

    Example:
        >>> views = torch.eye(2).expand(2, 2, 2)  # two samples of two classes, each seen twice
        >>> loss = supcl_seq_loss(views, torch.tensor([0, 1]), temperature=1.0)
        >>> round(float(loss), 4)  # log(1 + 2 / e)
        0.5514

    References:
        Sedghamiz et al. 2021, arXiv:2109.07424, section 3.
    """
    check_number("temperature", temperature, 0, open_low=True)
    if not views.is_floating_point() or views.dim() != 3:
        raise UsageError(f"views must be embeddings of shape [V, B, D], got {views.dtype} {tuple(views.shape)}.")
    if labels.shape != views.shape[1:2]:
        raise UsageError(f"labels must be one class for each of {views.shape[1]} samples, got {tuple(labels.shape)}.")
    passes, size = views.shape[:2]
    candidates_NVD, classes_N, start = views.transpose(0, 1), labels, 0
    if all_ranks:
        candidates_NVD, start = gather_over_ranks(candidates_NVD, group)
        classes_N, _ = gather_over_ranks(labels, group)
    anchors = views.transpose(0, 1).flatten(0, 1)
    scores = similarities(anchors, candidates_NVD.flatten(0, 1), cosine=True) / temperature
    rows = torch.arange(start * passes, (start + size) * passes, device=views.device).unsqueeze(-1)
    others = rows != torch.arange(scores.shape[1], device=views.device)
    same = labels.repeat_interleave(passes).unsqueeze(-1) == classes_N.repeat_interleave(passes)
    values, valid = info_nce(scores, same & others, others)
    if reduction == "none":
        return reduce_over_ranks(values, valid, reduction, denominator).view(size, passes).transpose(0, 1)
    return reduce_over_ranks(values, valid, reduction, denominator, all_ranks=all_ranks, group=group)


def dropout_views(
    model: nn.Module, encode: Callable[[], Tensor], *, dropouts: Sequence[float] = (0.0, 0.05, 0.2)
) -> Tensor:
    """Return embeddings of one batch by the model as it is and at other dropout probabilities.

    Args:
        model: whose dropout layers (and attention dropouts of `nn.MultiheadAttention`) are changed, and left as they
            were; in training mode.
        encode: returns the embeddings [B, D] of the batch by the model.
        dropouts: probability of each further view, in [0, 1).

    Returns:
        [1 + len(dropouts), B, D].

    Raises:
        UsageError: if a probability breaks its rule, or the model has no dropout that acts.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.1))
        >>> views = dropout_views(model, lambda: model(torch.ones(2, 4)), dropouts=(0.0, 0.5))
        >>> views.shape, model[1].p
        (torch.Size([3, 2, 3]), 0.1)
    """
    for p in dropouts:
        if not 0 <= p < 1:
            raise UsageError(f"dropouts must be in [0, 1), got {p!r}.")
    owners = [
        (module, "dropout" if isinstance(module, nn.MultiheadAttention) else "p")
        for module in model.modules()
        if isinstance(module, (nn.modules.dropout._DropoutNd, nn.MultiheadAttention)) and module.training
    ]
    if not owners:
        raise UsageError("the model has no dropout layer in training mode: its views would all be the same.")
    before = [getattr(module, name) for module, name in owners]
    views = [encode()]
    try:
        for p in dropouts:
            for module, name in owners:
                setattr(module, name, p)
            views.append(encode())
    finally:
        for (module, name), p in zip(owners, before, strict=True):
            setattr(module, name, p)
    return torch.stack(views)


CARD = Card(
    name="supcl-seq",
    room="losses",
    summary="supervised contrast between views of sequences made by other dropout probabilities",
    paper=Paper(
        "SupCL-Seq: Supervised Contrastive Learning for Downstream Optimized Sequence Representations",
        2021,
        arxiv="2109.07424",
        code="https://github.com/hooman650/SupCL-Seq",
    ),
    equation="loss_i = -1 / |P(i)| sum_{p in P(i)} log( exp(z_i z_p / tau) / sum_{b != i} exp(z_i z_b / tau) )",
    claim="Improves BERT-base on GLUE over cross-entropy: 6 % on CoLA, 5.4 % on MRPC, 4.7 % on RTE, 2.6 % on STS-B.",
    acts_on="loss",
    entry="trimtab.losses.representation.supervised_sequences:supcl_seq_loss",
    defaults=(Default("temperature", 0.05, "authors' code, SupCsTrainer.py"),),
    verified={
        "equation": (
            "tests/losses/representation/test_supervised_sequences.py::test_equals_numpy",
            "tests/losses/representation/test_supervised_sequences.py::test_gradient_is_softmax_less_the_positives",
            "tests/losses/representation/test_supervised_sequences.py::test_gradcheck",
            "tests/losses/representation/test_supervised_sequences.py::test_ranks_equal_the_single_process",
            "tests/losses/representation/test_supervised_sequences.py::"
            "test_dropout_views_differ_and_leave_the_model_as_it_was",
        ),
    },
    deviations=(
        "The authors' code multiplies the loss by tau / 0.07, a constant factor of 0.71 at its default; it is left "
        "out, as in the paper's equation.",
        "Probabilities of further views, (0, 0.05, 0.2), are those of the authors' code, which leaves the last "
        "one set where a view asks for the probability that the model has anyway; here each view gets its own, and all "
        "dropout layers of the model are set, not those of BERT alone.",
        "A view without any positive, which only a single view can be, counts as nothing; the authors' code gives NaN.",
        "Labels of regression tasks are not supported beyond equality, as in the authors' code.",
    ),
    experiments=(
        Experiment(
            "trimtab.studies.contrastive:sequences",
            "objective=cross-entropy,lr=0.01",
            "objective=supcl-seq,lr=0.003",
            metric="accuracy",
            higher_is_better=True,
            mechanism="separation",
            outcome=(
                "no evidence: 0.749 to 0.779, difference 0.0298 (95 % interval -0.0441 to 0.104), n=5; "
                "separation 0.595 to 0.267"
            ),
        ),
    ),
)
