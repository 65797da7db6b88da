"""StableMax cross-entropy: a softmax whose loss does not round to exactly 0 once every sample is fitted.

On a fitted training set, logits grow until exp absorbs the other classes in floating point: the loss is then exactly 0,
its gradient too, and learning stops before the model generalises (softmax collapse). StableMax replaces exp by a
function that grows linearly and falls like 1 / -x:

    s(x) = x + 1 for x >= 0, 1 / (1 - x) for x < 0;   StableMax(x)_i = s(x_i) / sum_j s(x_j)

Prieto et al. 2025 (arXiv:2501.04697); authors' code
LucasPrietoAl/grokking-at-the-edge-of-numerical-stability, utils.py. As log s(x) = sign(x) log(1 + |x|), it is a softmax
of logarithmically squeezed logits, and is computed as one.

Shape suffixes: B any leading dimensions, V classes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trimtab.card import Card, Default, Experiment, Paper
from trimtab.losses._reduction import check_logits, check_targets, reduce, working_dtype

__all__ = ["log_stablemax", "stablemax_cross_entropy"]


def log_stablemax(x: Tensor, dim: int = -1, *, dtype: torch.dtype | None = None) -> Tensor:
    """Return log StableMax(x) along a dimension, in float32 or better.

    Args:
        x: logits, of any shape; -inf has probability 0.
        dim: dimension of the classes.
        dtype: to compute in and to return, torch.float32 or torch.float64; default float32, or x's own if wider.

    Returns:
        Log-probabilities, in the shape of x.

    Raises:
        UsageError: if `dtype` is neither float32 nor float64, or x is not floating point.

    Example:
        >>> log_stablemax(torch.tensor([1.0, 0.0, -1.0])).exp()  # s = 2, 1, 1/2
        tensor([0.5714, 0.2857, 0.1429])
    """
    check_logits(x)
    x = x.to(working_dtype(x, dtype))
    # Each branch is clamped to its own side, or the gradient of the branch not taken would be NaN near x = 1 or x = -1.
    log_s = torch.where(x >= 0, torch.log1p(x.clamp(min=0)), -torch.log1p((-x).clamp(min=0)))
    return F.log_softmax(log_s, dim=dim)


def stablemax_cross_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    denominator: float | Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return the cross-entropy -log StableMax(logits)[target].

    Args:
        logits: [B..., V]; a logit that is +inf or NaN makes the loss non-finite, as in torch's cross-entropy.
        targets: [B...], class indices.
        ignore_index: target that does not count.
        reduction: `"mean"` over the targets that count, `"sum"` or `"none"`.
        denominator: what the mean divides by in place of the number of targets that count. Given the number of the
            whole batch, the losses of its micro-batches add up to that of the batch.
        dtype: to compute in, torch.float32 or torch.float64 (the authors' choice); default float32, or the logits' own
            if wider.

    Returns:
        A scalar, or [B...] with reduction `"none"`. Without any target that counts it is 0, with gradient 0.

    Raises:
        UsageError: if an argument breaks its rule.

    Example:
        >>> loss = stablemax_cross_entropy(torch.tensor([[1.0, 0.0, -1.0]]), torch.tensor([0]))
        >>> round(float(loss), 4)  # -log(2 / 3.5)
        0.5596

    References:
        Prieto et al. 2025, arXiv:2501.04697.
    """
    check_logits(logits)
    check_targets(logits, targets)
    valid = targets != ignore_index
    # Zeroed before, not after: 0 times the gradient of an infinite logit would be NaN.
    logits_BV = torch.where(valid.unsqueeze(-1), logits, torch.zeros_like(logits))
    chosen = torch.where(valid, targets, torch.zeros_like(targets)).long().unsqueeze(-1)
    values = -log_stablemax(logits_BV, dtype=dtype).gather(-1, chosen).squeeze(-1)
    return reduce(values, valid, reduction, denominator)


def _apply(loss: Callable[[Tensor, Tensor], Tensor], **options: Any) -> Callable[[Tensor, Tensor], Tensor]:
    """Return StableMax cross-entropy in place of a cross-entropy of (logits, targets); options as those above."""
    return functools.partial(stablemax_cross_entropy, **options)


CARD = Card(
    name="stablemax",
    room="losses",
    summary="cross-entropy with a softmax that cannot collapse to a loss of exactly 0",
    paper=Paper(
        "Grokking at the Edge of Numerical Stability",
        2025,
        arxiv="2501.04697",
        code="https://github.com/LucasPrietoAl/grokking-at-the-edge-of-numerical-stability",
    ),
    equation="loss = -log( s(x_y) / sum_j s(x_j) ), s(x) = x + 1 for x >= 0, 1 / (1 - x) for x < 0",
    claim="Prevents softmax collapse, so that models grok modular arithmetic and sparse parity without weight decay.",
    acts_on="loss",
    entry="trimtab.losses.stablemax:stablemax_cross_entropy",
    treats={"softmax-collapse": 1, "delayed-generalization": 2},
    defaults=(
        Default("dtype", None, "ours: float32, as the loss is computed in logarithms; authors' code: float64"),
        Default("reduction", "mean", "authors' code, utils.py"),
        Default("ignore_index", -100, "torch.nn.functional.cross_entropy"),
    ),
    verified={
        "equation": (
            "tests/losses/test_stablemax.py::test_equals_high_precision",
            "tests/losses/test_stablemax.py::test_gradient_is_closed_form",
            "tests/losses/test_stablemax.py::TestStablemaxCrossEntropy::test_micro_batches_add_up",
        ),
        "reference": ("tests/losses/test_stablemax.py::test_equals_the_definition_in_float64",),
    },
    deviations=(
        "The authors compute log(s / sum s) in float64, with 1e-30 added to 1 - x; that sum is 1 - x itself in float64 "
        "except where x rounds to 1, in the branch not taken. Here log s = sign(x) log(1 + |x|) goes through a "
        "log-softmax, in float32 by default.",
        "ignore_index, reduction='sum' and denominator are additions; reduction='none' gives [B] where the authors "
        "give [B, 1].",
        "As a remedy it takes the place of the loss it is given: that loss's class weights or label smoothing are "
        "dropped.",
    ),
    experiments=(
        Experiment(
            "modadd-nodecay",
            "adamw",
            "adamw,with=stablemax",
            metric="accuracy",
            higher_is_better=True,
            outcome=(
                "no evidence here: held-out accuracy stays below 0.1 % in both arms after 1,000 steps (n=5), and with "
                "StableMax after 10,000 steps too (one seed)"
            ),
        ),
    ),
    apply=_apply,
)
