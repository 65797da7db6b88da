"""Cut cross-entropy: the loss of a linear head without its logits in memory.

    s_iv   = cap(w_v . h_i + b_v),   lse_i = log sum_v exp(s_iv)
    loss_i = lse_i - (1 - e) s_iy - e mean_v s_iv + z lse_i^2

Blocks of logits are made, used and dropped. As the paper has it, the forward pass keeps one number a token and the
backward pass computes each block again; for the sum of a batch the gradients can be had with the loss, each block once.
Wijmans et al. 2024 (arXiv:2411.09009). e is label smoothing as in torch's cross-entropy, z that of z-loss,
cap(a) = c tanh(a / c) the soft cap of Gemma 2.

Shape suffixes: B any leading dimensions, N tokens, D width, V classes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from trimtab.card import Card, Default, Experiment, Paper
from trimtab.errors import UsageError, choose
from trimtab.losses._head_blocks import CutCrossEntropy, Head, TotalCutCrossEntropy
from trimtab.losses._reduction import check_targets, divide, reduce
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
    recompute: bool = False,
    backend: str = "torch",
    tokens_at_once: int | None = None,
    classes_at_once: int = 8192,
    ignore_index: int = -100,
    reduction: str = "mean",
    denominator: float | Tensor | None = None,
) -> Tensor:
    """Return the cross-entropy of `hidden @ weight.T + bias`, of which only one block is in memory at a time.

    Computed and summed in float32 or better, also under autocast; gradients of hidden, weight and bias come in the
    dtype of each. It has no second derivative. The Triton kernels were checked in Triton's interpreter and compiled for
    GPUs, but not yet run on one.

    Args:
        hidden: [B..., D], what the head is applied to.
        weight: [V, D], of the head.
        targets: [B...], class indices.
        bias: [V], of the head.
        label_smoothing: e, in [0, 1].
        z_loss: z, weight of the squared normaliser, at least 0.
        soft_cap: c, above 0; None for no cap.
        recompute: whether the backward pass computes the blocks again, as in the paper: a third more work, but nothing
            is kept between the passes, and backward may run more than once. Always so with reduction `"none"` and with
            Triton.
        backend: `"torch"`; `"triton"` for kernels, of tensors on a GPU in float32 or half precision; `"auto"` for
            Triton where it is installed and takes the tensors. Kernels multiply float32 as
            `torch.backends.cuda.matmul` says.
        tokens_at_once: rows of a block, at least 1; None for as many as make 2^23 logits. Triton has its own blocks.
        classes_at_once: columns of a block, at least 1; where blocks are computed once, they have all columns. Triton
            has its own blocks.
        ignore_index: target that does not count.
        reduction: `"mean"` over the targets that count, `"sum"` or `"none"`.
        denominator: what the mean divides by in place of the number of targets that count.

    Returns:
        A scalar, or [B...] with reduction `"none"`. Without any target that counts it is 0, with gradient 0.

    Raises:
        MissingExtraError: if Triton is asked for and not installed.
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
    for name, value in {
        "tokens_at_once": 1 if tokens_at_once is None else tokens_at_once,
        "classes_at_once": classes_at_once,
    }.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UsageError(f"{name} must be a whole number of at least 1, got {value!r}.")
    choose("backend", backend, ("auto", "torch", "triton"))
    _check_head(hidden, weight, bias)
    check_targets(hidden, targets)
    valid = targets != ignore_index
    # Zeroed before, not after: 0 times the gradient of an infinite activation would be NaN.
    kept = torch.where(valid.unsqueeze(-1), hidden, torch.zeros_like(hidden)).flatten(0, -2)
    labels = torch.where(valid, targets, torch.zeros_like(targets)).long().flatten()
    if labels.numel() and not bool(((labels >= 0) & (labels < weight.shape[0])).all()):
        raise UsageError(f"targets must be in [0, {weight.shape[0]}) or ignore_index, {ignore_index}.")
    head = Head(label_smoothing, z_loss, soft_cap, tokens_at_once, classes_at_once)
    if function := _kernels(backend, hidden, weight):
        return reduce(function(kept, weight, bias, labels, head).view(targets.shape), valid, reduction, denominator)
    once = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (hidden, weight, bias))
    if recompute or reduction not in ("mean", "sum") or not once:
        values: Tensor = CutCrossEntropy.apply(kept, weight, bias, labels, head)
        return reduce(values.view(targets.shape), valid, reduction, denominator)
    total: Tensor = TotalCutCrossEntropy.apply(kept, weight, bias, labels, valid.flatten(), head)
    return divide(total, valid.sum(), reduction, denominator)


def _kernels(backend: str, hidden: Tensor, weight: Tensor) -> Callable[..., Tensor] | None:
    """Return the function of the Triton kernels if they are to be used."""
    if backend != "triton" and not (backend == "auto" and hidden.is_cuda):
        return None
    from trimtab.losses._head_triton import TritonCutCrossEntropy, use_triton

    return TritonCutCrossEntropy.apply if use_triton(backend, hidden, weight) else None


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
        Default("recompute", False, "ours: the paper computes blocks again; equal gradients with a quarter less work"),
        Default("backend", "torch", "ours: the kernels have not run on a GPU yet; authors' code: Triton"),
        Default("tokens_at_once", None, "ours: blocks of 32 MiB in float32"),
        Default("classes_at_once", 8192, "ours"),
        Default("reduction", "mean", "torch.nn.functional.cross_entropy"),
        Default("ignore_index", -100, "torch.nn.functional.cross_entropy"),
    ),
    verified={
        "equation": (
            "tests/losses/test_cut_cross_entropy.py::test_gradcheck",
            "tests/losses/test_cut_cross_entropy.py::test_equals_the_loss_of_all_logits",
            "tests/losses/test_cut_cross_entropy.py::test_micro_batches_add_up",
            "tests/losses/test_cut_cross_entropy_triton.py::test_kernels_equal_the_loss_of_all_logits",
            "tests/losses/test_cut_cross_entropy_triton.py::test_kernels_compile_for_gpus",
        ),
        "reference": (
            "tests/losses/test_cut_cross_entropy.py::test_equals_torch",
            "tests/losses/test_cut_cross_entropy_reference.py::test_equals_cut_cross_entropy",
        ),
        "claim": ("tests/losses/test_cut_cross_entropy.py::test_logits_are_never_in_memory",),
    },
    deviations=(
        "Backend torch: blocks are plain tensor operations in float32, where the authors have Triton kernels in the "
        "inputs' dtype: the memory of logits is saved as in the paper; their speed is not reached, nor their temporary "
        "memory.",
        "Backend triton: kernels of our own, run in Triton's interpreter (3.7 and 3.9) and compiled for sm_80, sm_90 "
        "and gfx942, but never run on a GPU: their speed and memory are not measured.",
        "Backend triton: in backward every sum belongs to one program of one of two kernels, where the authors add "
        "under locks: the same results in every run, for one more product of hidden states and head. Sums are float32 "
        "buffers of the size of the gradients; half-precision inputs meet gradients in scores of twice their digits.",
        "Blocks whose gradient is below the inputs' precision are not skipped: gradients are exact.",
    ),
    experiments=(
        Experiment(
            "trimtab.studies.head:memory",
            "way=dense",
            "way=cut",
            metric="peak_mib",
            mechanism="loss",
            seeds=3,
            outcome=(
                "better: 375.8 to 32.3, difference -343.5 (95 % interval -343.5 to -343.5), n=3; loss 10.9 to 10.9"
            ),
        ),
    ),
)
