"""Cross-entropy of a linear head by blocks on a GPU: Triton kernels of cut cross-entropy, as an autograd function.

Forward: a program takes a block of tokens and a range of classes, goes through its blocks of scores and keeps an online
log-sum-exp, the label's score and the sum of scores; ranges are put together afterwards. Backward: blocks of scores are
computed again, in one kernel whose programs own blocks of tokens (gradient of hidden) and in one whose programs own
blocks of classes (gradients of weight and bias). No two programs add to one place: results are the same in every run.

Scores and sums are float32. Half-precision inputs are multiplied as they are, which is exact; a gradient in scores goes
into such products as the sum of two numbers of that precision, which keeps twice its digits.

The kernels were run in Triton's interpreter and compiled for GPUs, but not run on one.

Shape suffixes: N tokens, D width, V classes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trimtab.errors import MissingExtraError, UsageError
from trimtab.losses._head_blocks import Head, _values

try:
    import triton
    import triton.language as tl
except ImportError:  # optional: the kernels are then plain functions that nobody calls
    triton = None

_TOKENS, _CLASSES = 64, 128
"""Rows and columns of a block of scores."""
_PROGRAMS = 512
"""Programs of the forward pass to aim for where blocks of tokens alone would leave a GPU idle."""


def _jit(function: Any) -> Any:
    return function if triton is None else triton.jit(function)


@_jit
def _dot(a, b, total, PRECISION: tl.constexpr, WIDEN: tl.constexpr):
    """Return total + a b in float32; WIDEN for the interpreter, which multiplies no bfloat16."""
    if WIDEN:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, total, input_precision=PRECISION)


@_jit
def _product(g, x, PRECISION: tl.constexpr, WIDEN: tl.constexpr):
    """Return g x; g as two terms of x's dtype if that is half precision."""
    total = tl.zeros([g.shape[0], x.shape[1]], tl.float32)
    if x.dtype == tl.float32:
        total = _dot(g, x, total, PRECISION, WIDEN)
    else:
        high = g.to(x.dtype)
        low = (g - high.to(tl.float32)).to(x.dtype)
        total = _dot(high, x, _dot(low, x, total, PRECISION, WIDEN), PRECISION, WIDEN)
    return total


@_jit
def _block(x, rows, columns, ROWS, COLUMNS, row_stride, column_stride):
    """Return a block of a matrix, 0 beyond its end; offsets are 64 bits wide for heads of more than 2^31 elements."""
    place = rows.to(tl.int64)[:, None] * row_stride + columns.to(tl.int64)[None, :] * column_stride
    return tl.load(x + place, (rows < ROWS)[:, None] & (columns < COLUMNS)[None, :], other=0.0)


@_jit
def _add(x, rows, columns, ROWS, COLUMNS, change):
    """Add to a block of a contiguous matrix that belongs to this program alone."""
    place = x + rows.to(tl.int64)[:, None] * COLUMNS + columns[None, :]
    inside = (rows < ROWS)[:, None] & (columns < COLUMNS)[None, :]
    tl.store(place, tl.load(place, inside, other=0.0) + change, inside)


@_jit
def _raw_scores(
    left, right, rows, columns, ROWS, COLUMNS, D, left_row, left_column, right_row, right_column,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Return left[rows] right[columns]^T, 0 beyond the last of the ROWS and COLUMNS that there are."""
    s = tl.zeros([rows.shape[0], columns.shape[0]], tl.float32)
    for start in range(0, D, WIDTH):
        at = start + tl.arange(0, WIDTH)
        a = _block(left, rows, at, ROWS, D, left_row, left_column)
        b = _block(right, at, columns, D, COLUMNS, right_column, right_row)
        s = _dot(a.to(DTYPE), b.to(DTYPE), s, PRECISION, WIDEN)
    return s


@_jit
def _offset(bias, columns, V):
    """Return the bias of a block of classes, 0 without one."""
    offset = tl.zeros([columns.shape[0]], tl.float32)
    if bias is not None:
        offset += tl.load(bias + columns, columns < V, other=0.0).to(tl.float32)
    return offset


@_jit
def _capped(s, cap):
    if cap is not None:
        x = s / cap
        square = x * x
        series = x * (1 + square * (-1 / 3 + square * (2 / 15 - square * (17 / 315))))
        t = tl.exp(-2 * tl.abs(x))
        size = (1 - t) / (1 + t)
        # tanh; where 1 - t would cancel, its series, whose next term is below float32's precision.
        s = cap * tl.where(tl.abs(x) < 0.15, series, tl.where(x < 0, -size, size))
    return s


@_jit
def _to_scores(s, lse, labels, share, columns, inside, V, smoothing, z, cap):
    """Return the gradient in the scores before the cap, 0 where not `inside`; all broadcast to the block."""
    g = tl.exp(s - lse) * (1 + 2 * z * lse) - smoothing / V
    g -= tl.where(columns == labels, 1 - smoothing, 0.0)
    g *= share
    if cap is not None:
        g *= 1 - (s / cap) * (s / cap)
    return tl.where(inside, g, 0.0)


@_jit
def _forward_kernel(
    hidden, weight, bias, labels, lse, chosen, total, N, V, D, weight_row, weight_column, cap, RANGE,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
    TOKENS: tl.constexpr, CLASSES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Write lse, label's score (0 if elsewhere) and sum of scores of a block of tokens over a range of classes."""
    rows = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    first = tl.program_id(1) * RANGE
    label = tl.load(labels + rows, rows < N, other=-1)
    top = tl.full([TOKENS], -float("inf"), tl.float32)
    mass = tl.zeros([TOKENS], tl.float32)
    at_label = tl.zeros([TOKENS], tl.float32)
    sum_ = tl.zeros([TOKENS], tl.float32)
    for start in range(first, tl.minimum(first + RANGE, V), CLASSES):
        columns = start + tl.arange(0, CLASSES)
        s = _raw_scores(
            hidden, weight, rows, columns, N, V, D, D, 1, weight_row, weight_column, DTYPE, PRECISION, WIDEN, WIDTH
        )
        s = _capped(s + _offset(bias, columns, V)[None, :], cap)
        inside = (columns < V)[None, :]
        at_label += tl.sum(tl.where(columns[None, :] == label[:, None], s, 0.0), 1)
        sum_ += tl.sum(tl.where(inside, s, 0.0), 1)
        s = tl.where(inside, s, -float("inf"))
        higher = tl.maximum(top, tl.max(s, 1))
        # Of infinities no difference can be taken.
        base = tl.where(tl.abs(higher) == float("inf"), 0.0, higher)
        mass = mass * tl.exp(top - base) + tl.sum(tl.exp(s - base[:, None]), 1)
        top = higher
    place = tl.program_id(1) * N + rows
    base = tl.where(tl.abs(top) == float("inf"), 0.0, top)
    tl.store(lse + place, base + tl.log(mass), rows < N)
    tl.store(chosen + place, at_label, rows < N)
    tl.store(total + place, sum_, rows < N)


@_jit
def _hidden_kernel(
    hidden, weight, bias, labels, lse, share, gradient,
    N, V, D, weight_row, weight_column, smoothing, z, cap, RANGE,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
    TOKENS: tl.constexpr, CLASSES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Add the gradient of a block of hidden states, from a range of classes, to gradient [ranges, N, D]."""
    rows = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    first = tl.program_id(1) * RANGE
    label = tl.load(labels + rows, rows < N, other=-1)
    norm = tl.load(lse + rows, rows < N, other=0.0)
    factor = tl.load(share + rows, rows < N, other=0.0)
    gradient += tl.program_id(1).to(tl.int64) * N * D
    for start in range(first, tl.minimum(first + RANGE, V), CLASSES):
        columns = start + tl.arange(0, CLASSES)
        s = _raw_scores(
            hidden, weight, rows, columns, N, V, D, D, 1, weight_row, weight_column, DTYPE, PRECISION, WIDEN, WIDTH
        )
        s = _capped(s + _offset(bias, columns, V)[None, :], cap)
        inside = (rows < N)[:, None] & (columns < V)[None, :]
        g = _to_scores(
            s, norm[:, None], label[:, None], factor[:, None], columns[None, :], inside, V, smoothing, z, cap
        )
        for at in range(0, D, WIDTH):
            width = at + tl.arange(0, WIDTH)
            w = _block(weight, columns, width, V, D, weight_row, weight_column)
            _add(gradient, rows, width, N, D, _product(g, w.to(DTYPE), PRECISION, WIDEN))
        # What one thread stored, another may load in the next round.
        tl.debug_barrier()


@_jit
def _weight_kernel(
    hidden, weight, bias, labels, lse, share, gradient, bias_gradient,
    N, V, D, weight_row, weight_column, smoothing, z, cap,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
    TOKENS: tl.constexpr, CLASSES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Add the gradient of a block of the head's rows to gradient [V, D], write that of the bias; either may be None."""
    columns = tl.program_id(0) * CLASSES + tl.arange(0, CLASSES)
    offset = _offset(bias, columns, V)
    sum_ = tl.zeros([CLASSES], tl.float32)
    for start in range(0, N, TOKENS):
        rows = start + tl.arange(0, TOKENS)
        label = tl.load(labels + rows, rows < N, other=-1)
        norm = tl.load(lse + rows, rows < N, other=0.0)
        factor = tl.load(share + rows, rows < N, other=0.0)
        # Blocks have classes for rows here, so that they go into the product as they are.
        s = _raw_scores(
            weight, hidden, columns, rows, V, N, D, weight_row, weight_column, D, 1, DTYPE, PRECISION, WIDEN, WIDTH
        )
        s = _capped(s + offset[:, None], cap)
        inside = (columns < V)[:, None] & (rows < N)[None, :]
        g = _to_scores(
            s, norm[None, :], label[None, :], factor[None, :], columns[:, None], inside, V, smoothing, z, cap
        )
        sum_ += tl.sum(g, 1)
        if gradient is not None:
            for at in range(0, D, WIDTH):
                width = at + tl.arange(0, WIDTH)
                h = _block(hidden, rows, width, N, D, D, 1)
                _add(gradient, columns, width, V, D, _product(g, h.to(DTYPE), PRECISION, WIDEN))
            tl.debug_barrier()
    if bias_gradient is not None:
        tl.store(bias_gradient + columns, sum_, columns < V)


_INTERPRETED = triton is not None and not isinstance(_forward_kernel, triton.JITFunction)


class TritonCutCrossEntropy(torch.autograd.Function):
    """loss_i, [N], from hidden [N, D], weight [V, D], bias [V] or None and labels [N]; blocks are computed again."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, head: Head) -> Tensor:
        hidden, labels = hidden.contiguous(), labels.contiguous()
        bias = None if bias is None else bias.contiguous()
        (tokens, width), classes = hidden.shape, weight.shape[0]
        size, ranges = _ranges(tokens, classes, _PROGRAMS)
        lse, chosen, total = hidden.new_empty(3, ranges, tokens, dtype=torch.float32)
        if tokens:
            with torch.cuda.device_of(hidden):
                _forward_kernel[_parts(tokens, _TOKENS), ranges](
                    *(hidden, weight, bias, labels, lse, chosen, total),
                    *(tokens, classes, width, *weight.stride(), _float(head.soft_cap), size),
                    **_constants(hidden, weight),
                )
        lse_N = lse.logsumexp(0)
        ctx.head = head
        ctx.save_for_backward(hidden, weight, bias, labels, lse_N)
        # Scores may sum to infinity where nobody wants the sum.
        total_N = total.sum(0) if head.label_smoothing else torch.zeros_like(lse_N)
        return _values(lse_N, chosen.sum(0), total_N, classes, head)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, labels, lse_N = ctx.saved_tensors
        head, (tokens, width), classes = ctx.head, hidden.shape, weight.shape[0]
        of_hidden = of_weight = of_bias = None
        size, ranges = _ranges(tokens, classes, _PROGRAMS // 4)
        if ctx.needs_input_grad[0]:
            of_hidden = hidden.new_zeros(ranges, tokens, width, dtype=torch.float32)
        if ctx.needs_input_grad[1]:
            of_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        if bias is not None and ctx.needs_input_grad[2]:
            of_bias = torch.zeros(bias.shape, dtype=torch.float32, device=bias.device)
        if tokens:
            # As shares of the largest, gradients in scores are in the range of half precision, however small they are.
            largest = grad_N.abs() * (1 + 2 * head.z_loss * lse_N.abs()) if head.z_loss else grad_N.abs()
            largest = largest.amax().clamp(min=torch.finfo(torch.float32).tiny)
            inputs = (hidden, weight, bias, labels, lse_N, (grad_N / largest).contiguous())
            options = (float(head.label_smoothing), float(head.z_loss), _float(head.soft_cap))
            sizes = (tokens, classes, width, *weight.stride(), *options)
            constants = _constants(hidden, weight)
            with torch.cuda.device_of(hidden):
                if of_hidden is not None:
                    grid = (_parts(tokens, _TOKENS), ranges)
                    _hidden_kernel[grid](*inputs, of_hidden, *sizes, size, **constants)
                    of_hidden *= largest
                if of_weight is not None or of_bias is not None:
                    _weight_kernel[(_parts(classes, _CLASSES),)](*inputs, of_weight, of_bias, *sizes, **constants)
                    for each in (of_weight, of_bias):
                        if each is not None:
                            each *= largest
        return (
            None if of_hidden is None else of_hidden.sum(0).to(hidden.dtype),
            None if of_weight is None else of_weight.to(weight.dtype),
            None if of_bias is None else of_bias.to(bias.dtype),
            None,
            None,
        )


def use_triton(backend: str, hidden: Tensor, weight: Tensor) -> bool:
    """Return whether the kernels are to compute the loss of a head.

    Raises:
        MissingExtraError: if they were asked for and Triton is not installed.
        UsageError: if they were asked for tensors that they do not take.
    """
    devices = {hidden.device.type, weight.device.type}
    fits = {hidden.dtype, weight.dtype} <= {torch.float32, torch.bfloat16, torch.float16}
    if backend != "triton":
        return backend == "auto" and devices == {"cuda"} and fits and triton is not None
    if triton is None:
        raise MissingExtraError("triton is not installed: run pip install triton.")
    if devices != {"cuda"} and not _INTERPRETED:
        raise UsageError(
            f"backend 'triton' needs tensors on a GPU, got {' and '.join(sorted(devices))}: use backend='torch', or "
            "set TRITON_INTERPRET=1 before Python starts."
        )
    if not fits:
        raise UsageError(
            f"backend 'triton' computes in float32, got {hidden.dtype} and {weight.dtype}: use backend='torch'."
        )
    return True


def _parts(size: int, step: int) -> int:
    return -(-size // step)


def _ranges(tokens: int, classes: int, programs: int) -> tuple[int, int]:
    """Return the size of a range of classes, a multiple of a block's, and how many there are."""
    wanted = max(1, programs // max(1, _parts(tokens, _TOKENS)))
    size = _parts(_parts(classes, _CLASSES), wanted) * _CLASSES
    return size, _parts(classes, size)


def _float(value: float | None) -> float | None:
    return None if value is None else float(value)


def _constants(hidden: Tensor, weight: Tensor) -> dict[str, Any]:
    """Return what the kernels are compiled for."""
    dtype = torch.promote_types(hidden.dtype, weight.dtype)
    names = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
    # float32 is multiplied as torch would: its newer setting where it has that, for the older may then not be read.
    matmul = torch.backends.cuda.matmul
    precision = getattr(matmul, "fp32_precision", None) or ("tf32" if matmul.allow_tf32 else "ieee")
    rounded = precision == "tf32" and torch.version.hip is None
    return {
        "DTYPE": names[dtype],
        "PRECISION": "tf32" if rounded else "ieee",
        "WIDEN": _INTERPRETED and dtype == torch.bfloat16,
        "TOKENS": _TOKENS,
        "CLASSES": _CLASSES,
        "WIDTH": 32 if dtype == torch.float32 else 64,
        "num_warps": 8,
    }
