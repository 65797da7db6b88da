"""Cut cross-entropy: the loss of a linear head without its logits in memory.

    s_iv   = cap(w_v . h_i + b_v),   lse_i = log sum_v exp(s_iv)
    loss_i = lse_i - (1 - e) s_iy - e mean_v s_iv + z lse_i^2

The forward pass goes over blocks of tokens and of classes, and keeps one number a token; the backward pass computes
each block again. Wijmans et al. 2024 (arXiv:2411.09009). e is label smoothing as in torch's cross-entropy, z that of
z-loss, cap(a) = c tanh(a / c) the soft cap of Gemma 2.

Shape suffixes: B any leading dimensions, N tokens, D width, V classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trimtab.card import Card, Default, Paper
from trimtab.errors import UsageError
from trimtab.losses._reduction import check_targets, reduce
from trimtab.losses.preference._pairs import check_number

__all__ = ["linear_cross_entropy"]


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    soft_cap: float | None = None,
    tokens_at_once: int = 1024,
    classes_at_once: int = 8192,
    ignore_index: int = -100,
    reduction: str = "mean",
    denominator: float | Tensor | None = None,
) -> Tensor:
    """Return the cross-entropy of `hidden @ weight.T + bias`, of which only one block is in memory at a time.

    Computed and summed in float32 or better, also under autocast; gradients of hidden, weight and bias come in the
    dtype of each. It has no second derivative.

    Args:
        hidden: [B..., D], what the head is applied to.
        weight: [V, D], of the head.
        targets: [B...], class indices.
        bias: [V], of the head.
        label_smoothing: e, in [0, 1].
        z_loss: z, weight of the squared normaliser, at least 0.
        soft_cap: c, above 0; None for no cap.
        tokens_at_once: rows of a block, at least 1.
        classes_at_once: columns of a block, at least 1.
        ignore_index: target that does not count.
        reduction: `"mean"` over the targets that count, `"sum"` or `"none"`.
        denominator: what the mean divides by in place of the number of targets that count.

    Returns:
        A scalar, or [B...] with reduction `"none"`. Without any target that counts it is 0, with gradient 0.

    Raises:
        UsageError: if an argument breaks its rule.

    Example:
        >>> loss = linear_cross_entropy(torch.ones(3, 2), torch.zeros(4, 2), torch.tensor([0, 1, -100]))
        >>> round(float(loss), 4)  # log 4
        1.3863

    References:
        Wijmans et al. 2024, arXiv:2411.09009 (https://github.com/apple/ml-cross-entropy).
    """
    check_number("label_smoothing", label_smoothing, 0, 1)
    check_number("z_loss", z_loss, 0)
    if soft_cap is not None:
        check_number("soft_cap", soft_cap, 0, open_low=True)
    for name, value in {"tokens_at_once": tokens_at_once, "classes_at_once": classes_at_once}.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UsageError(f"{name} must be a whole number of at least 1, got {value!r}.")
    _check_head(hidden, weight, bias)
    check_targets(hidden, targets)
    valid = targets != ignore_index
    # Zeroed before, not after: 0 times the gradient of an infinite activation would be NaN.
    kept = torch.where(valid.unsqueeze(-1), hidden, torch.zeros_like(hidden)).flatten(0, -2)
    labels = torch.where(valid, targets, torch.zeros_like(targets)).long().flatten()
    if labels.numel() and not bool(((labels >= 0) & (labels < weight.shape[0])).all()):
        raise UsageError(f"targets must be in [0, {weight.shape[0]}) or ignore_index, {ignore_index}.")
    options = (label_smoothing, z_loss, soft_cap, tokens_at_once, classes_at_once)
    values: Tensor = _CutCrossEntropy.apply(kept, weight, bias, labels, options)
    return reduce(values.view(targets.shape), valid, reduction, denominator)


def _check_head(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Raise a UsageError unless hidden states, weight and bias fit."""
    if weight.dim() != 2 or hidden.dim() < 2 or hidden.shape[-1] != weight.shape[-1] or not weight.shape[0]:
        raise UsageError(
            f"hidden must be [B..., D] and weight [V, D], got {tuple(hidden.shape)} and {tuple(weight.shape)}."
        )
    if not hidden.is_floating_point() or not weight.is_floating_point():
        raise UsageError(f"hidden and weight must be floating point, got {hidden.dtype} and {weight.dtype}.")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise UsageError(f"bias must have shape {tuple(weight.shape[:1])}, got {tuple(bias.shape)}.")


class _CutCrossEntropy(torch.autograd.Function):
    """loss_i, [N], from hidden [N, D], weight [V, D], bias [V] or None and labels [N]."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, options: Any) -> Tensor:
        smoothing, z_loss, cap, tokens, classes = options
        wide = _wide(hidden, weight)
        lse_N = hidden.new_empty(hidden.shape[0], dtype=wide)
        values_N = torch.empty_like(lse_N)
        with torch.autocast(hidden.device.type, enabled=False):
            for rows in _blocks(hidden.shape[0], tokens):
                h = hidden[rows].to(wide)
                lse = h.new_full((h.shape[0],), -torch.inf)
                chosen, total = torch.zeros_like(lse), torch.zeros_like(lse)
                for columns in _blocks(weight.shape[0], classes):
                    s = _scores(h, weight[columns], None if bias is None else bias[columns], cap)
                    lse = torch.logaddexp(lse, s.logsumexp(-1))
                    here, place = _labels_in(labels[rows], columns)
                    chosen += torch.where(here, s.gather(-1, place).squeeze(-1), torch.zeros_like(lse))
                    total += s.sum(-1) if smoothing else 0
                lse_N[rows] = lse
                values_N[rows] = lse - (1 - smoothing) * chosen - smoothing / weight.shape[0] * total
        ctx.options = options
        ctx.save_for_backward(hidden, weight, bias, labels, lse_N)
        return values_N + z_loss * lse_N.square()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, labels, lse_N = ctx.saved_tensors
        smoothing, z_loss, cap, tokens, classes = ctx.options
        wide = lse_N.dtype
        to_hidden, to_weight, to_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.zeros_like(hidden, dtype=wide) if to_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if to_weight else None
        grad_bias = torch.zeros_like(bias, dtype=wide) if to_bias else None
        with torch.autocast(hidden.device.type, enabled=False):
            for rows in _blocks(hidden.shape[0], tokens):
                h, lse, grad = hidden[rows].to(wide), lse_N[rows].unsqueeze(-1), grad_N[rows].unsqueeze(-1)
                for columns in _blocks(weight.shape[0], classes):
                    w = weight[columns].to(wide)
                    s = _scores(h, w, None if bias is None else bias[columns], cap)
                    change = torch.exp(s - lse) * (1 + 2 * z_loss * lse) - smoothing / weight.shape[0]
                    here, place = _labels_in(labels[rows], columns)
                    change.scatter_add_(-1, place, -(1 - smoothing) * here.to(wide).unsqueeze(-1))
                    change *= grad if cap is None else grad * (1 - (s / cap).square())
                    if grad_hidden is not None:
                        grad_hidden[rows] += change @ w
                    if grad_weight is not None:
                        grad_weight[columns] += change.T @ h
                    if grad_bias is not None:
                        grad_bias[columns] += change.sum(0)
        return (
            None if grad_hidden is None else grad_hidden.to(hidden.dtype),
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            None,
            None,
        )


def _wide(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """Return the dtype to compute in."""
    return torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)


def _blocks(size: int, step: int) -> Iterator[slice]:
    for start in range(0, size, step):
        yield slice(start, min(start + step, size))


def _scores(h: Tensor, weight: Tensor, bias: Tensor | None, cap: float | None) -> Tensor:
    """Return a block of capped logits, in the dtype of h."""
    a = h @ weight.to(h.dtype).T
    if bias is not None:
        a += bias.to(h.dtype)
    return a if cap is None else cap * torch.tanh(a / cap)


def _labels_in(labels: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
    """Return which labels are in a block of classes, [N], and where, [N, 1] (0 for the others)."""
    here = (labels >= columns.start) & (labels < columns.stop)
    return here, torch.where(here, labels - columns.start, torch.zeros_like(labels)).unsqueeze(-1)


CARD = Card(
    name="cut-cross-entropy",
    room="losses",
    summary="cross-entropy of a linear head block by block, so that the logits are never in memory",
    paper=Paper(
        "Cut Your Losses in Large-Vocabulary Language Models",
        2024,
        arxiv="2411.09009",
        code="https://github.com/apple/ml-cross-entropy",
    ),
    equation="loss = log sum_v exp(w_v . h) - w_y . h, by blocks of tokens and classes, computed again in backward",
    claim="Memory of Gemma 2's loss from 24 GB to 1 MB, without loss of speed or convergence.",
    acts_on="loss",
    entry="trimtab.losses.cut_cross_entropy:linear_cross_entropy",
    defaults=(
        Default("label_smoothing", 0.0, "torch.nn.functional.cross_entropy"),
        Default("z_loss", 0.0, "paper: none"),
        Default("soft_cap", None, "paper: the model's"),
        Default("tokens_at_once", 1024, "ours: with 8,192 classes a block is 32 MiB in float32"),
        Default("classes_at_once", 8192, "ours: as above"),
        Default("reduction", "mean", "torch.nn.functional.cross_entropy"),
        Default("ignore_index", -100, "torch.nn.functional.cross_entropy"),
    ),
    verified={
        "equation": (
            "tests/losses/test_cut_cross_entropy.py::test_gradcheck",
            "tests/losses/test_cut_cross_entropy.py::test_equals_the_loss_of_all_logits",
            "tests/losses/test_cut_cross_entropy.py::test_micro_batches_add_up",
        ),
        "reference": ("tests/losses/test_cut_cross_entropy.py::test_equals_torch",),
        "claim": ("tests/losses/test_cut_cross_entropy.py::test_logits_are_never_in_memory",),
    },
    deviations=(
        "Blocks are plain tensor operations in float32, where the authors have Triton kernels in the inputs' dtype: "
        "the memory of logits is saved as in the paper; their speed and temporary memory are not reached.",
        "Blocks whose gradient is below the inputs' precision are not skipped: gradients are exact.",
    ),
)
