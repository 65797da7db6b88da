"""Cross-entropy of a linear head by blocks on a GPU: Triton kernels of cut cross-entropy, as an autograd function.

Forward: a program takes a block of tokens and a range of classes, goes through its blocks of scores and keeps an online
log-sum-exp, the label's score and the sum of scores; ranges are put together afterwards. Backward: blocks of scores are
computed again, in one kernel whose programs own blocks of tokens (gradient of hidden) and in one whose programs own
blocks of classes (gradients of weight and bias). No two programs add to one place: results are the same in every run.

Scores and sums are float32. Half-precision inputs are multiplied as they are, which is exact; a gradient in scores goes
into such products as the sum of two numbers of that precision, which keeps twice its digits.

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

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_TOKENS, _CLASSES = 64, 128
"""Rows and columns of a block of scores."""
_PROGRAMS = 512
"""Programs to aim for where blocks of tokens alone would leave a GPU idle."""


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
def _tanh(x):
    # Where 1 - t would cancel, the series: its next term is below float32's precision.
    square = x * x
    series = x * (1 + square * (-1 / 3 + square * (2 / 15 - square * (17 / 315))))
    t = tl.exp(-2 * tl.abs(x))
    size = (1 - t) / (1 + t)
    return tl.where(tl.abs(x) < 0.15, series, tl.where(x < 0, -size, size))


@_jit
def _scores(
    hidden,
    weight,
    bias,
    rows,
    columns,
    N,
    V,
    D,
    hidden_row,
    hidden_column,
    weight_row,
    weight_column,
    cap,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    TOKENS: tl.constexpr,
    CLASSES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Return a block of capped scores; rows and columns beyond the last have scores that mean nothing."""
    # Offsets are 64 bits wide: a large head has more than 2^31 elements.
    hidden += rows.to(tl.int64)[:, None] * hidden_row
    weight += columns.to(tl.int64)[None, :] * weight_row
    s = tl.zeros([TOKENS, CLASSES], tl.float32)
    for start in range(0, D, WIDTH):
        place = start + tl.arange(0, WIDTH).to(tl.int64)
        inside = place < D
        h = tl.load(hidden + place[None, :] * hidden_column, (rows < N)[:, None] & inside[None, :], other=0.0)
        w = tl.load(weight + place[:, None] * weight_column, inside[:, None] & (columns < V)[None, :], other=0.0)
        s = _dot(h.to(DTYPE), w.to(DTYPE), s, PRECISION, WIDEN)
    if bias is not None:
        s += tl.load(bias + columns, columns < V, other=0.0).to(tl.float32)[None, :]
    if cap is not None:
        s = cap * _tanh(s / cap)
    return s


@_jit
def _to_scores(s, lse, labels, share, rows, columns, N, V, smoothing, z, cap):
    """Return the gradient in the scores before the cap, 0 beyond the last row and column."""
    g = tl.exp(s - lse[:, None]) * (1 + 2 * z * lse)[:, None] - smoothing / V
    g -= tl.where(columns[None, :] == labels[:, None], 1 - smoothing, 0.0)
    g *= share[:, None]
    if cap is not None:
        g *= 1 - (s / cap) * (s / cap)
    return tl.where((rows < N)[:, None] & (columns < V)[None, :], g, 0.0)


@_jit
def _product(g, x, PRECISION: tl.constexpr, WIDEN: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Return g x; g as two terms of x's dtype if that is half precision."""
    total = tl.zeros([ROWS, WIDTH], tl.float32)
    if x.dtype == tl.float32:
        total = _dot(g, x, total, PRECISION, WIDEN)
    else:
        high = g.to(x.dtype)
        low = (g - high.to(tl.float32)).to(x.dtype)
        total = _dot(high, x, _dot(low, x, total, PRECISION, WIDEN), PRECISION, WIDEN)
    return total


@_jit
def _forward_kernel(
    hidden,
    weight,
    bias,
    labels,
    lse,
    chosen,
    total,
    N,
    V,
    D,
    hidden_row,
    hidden_column,
    weight_row,
    weight_column,
    cap,
    RANGE: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    TOKENS: tl.constexpr,
    CLASSES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Write lse, label's score (0 if it is elsewhere) and sum of scores of a block of tokens over a range of classes."""
    rows = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    first = tl.program_id(1) * RANGE
    label = tl.load(labels + rows, rows < N, other=-1)
    top = tl.full([TOKENS], -float("inf"), tl.float32)
    mass = tl.zeros([TOKENS], tl.float32)
    at_label = tl.zeros([TOKENS], tl.float32)
    sum_ = tl.zeros([TOKENS], tl.float32)
    for start in range(first, tl.minimum(first + RANGE, V), CLASSES):
        columns = start + tl.arange(0, CLASSES)
        s = _scores(
            hidden, weight, bias, rows, columns, N, V, D, hidden_row, hidden_column, weight_row, weight_column, cap,
            DTYPE, PRECISION, WIDEN, TOKENS, CLASSES, WIDTH,
        )  # fmt: skip
        inside = (columns < V)[None, :]
        at_label += tl.sum(tl.where(columns[None, :] == label[:, None], s, 0.0), 1)
        sum_ += tl.sum(tl.where(inside, s, 0.0), 1)
        s = tl.where(inside, s, -float("inf"))
        higher = tl.maximum(top, tl.max(s, 1))
        # All scores so far may be -inf, of which no difference can be taken.
        base = tl.where(higher == -float("inf"), 0.0, higher)
        mass = mass * tl.exp(top - base) + tl.sum(tl.exp(s - base[:, None]), 1)
        top = higher
    place = tl.program_id(1) * N + rows
    base = tl.where(top == -float("inf"), 0.0, top)
    tl.store(lse + place, base + tl.log(mass), rows < N)
    tl.store(chosen + place, at_label, rows < N)
    tl.store(total + place, sum_, rows < N)


@_jit
def _hidden_kernel(
    hidden,
    weight,
    bias,
    labels,
    lse,
    share,
    gradient,
    N,
    V,
    D,
    hidden_row,
    hidden_column,
    weight_row,
    weight_column,
    smoothing,
    z,
    cap,
    RANGE: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    TOKENS: tl.constexpr,
    CLASSES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Add the gradient of a block of hidden states, from a range of classes, to gradient [ranges, N, D]."""
    rows = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    first = tl.program_id(1) * RANGE
    label = tl.load(labels + rows, rows < N, other=-1)
    norm = tl.load(lse + rows, rows < N, other=0.0)
    factor = tl.load(share + rows, rows < N, other=0.0)
    gradient += (tl.program_id(1).to(tl.int64) * N + rows)[:, None] * D
    for start in range(first, tl.minimum(first + RANGE, V), CLASSES):
        columns = start + tl.arange(0, CLASSES)
        s = _scores(
            hidden, weight, bias, rows, columns, N, V, D, hidden_row, hidden_column, weight_row, weight_column, cap,
            DTYPE, PRECISION, WIDEN, TOKENS, CLASSES, WIDTH,
        )  # fmt: skip
        g = _to_scores(s, norm, label, factor, rows, columns, N, V, smoothing, z, cap)
        for at in range(0, D, WIDTH):
            place = at + tl.arange(0, WIDTH).to(tl.int64)
            inside = (place < D)[None, :]
            w = tl.load(
                weight + columns.to(tl.int64)[:, None] * weight_row + place[None, :] * weight_column,
                (columns < V)[:, None] & inside,
                other=0.0,
            )
            change = _product(g, w.to(DTYPE), PRECISION, WIDEN, TOKENS, WIDTH)
            mine = (rows < N)[:, None] & inside
            tl.store(gradient + place[None, :], tl.load(gradient + place[None, :], mine, other=0.0) + change, mine)
        # What one thread stored, another may load in the next round.
        tl.debug_barrier()


@_jit
def _weight_kernel(
    hidden,
    weight,
    bias,
    labels,
    lse,
    share,
    gradient,
    bias_gradient,
    N,
    V,
    D,
    hidden_row,
    hidden_column,
    weight_row,
    weight_column,
    smoothing,
    z,
    cap,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    TOKENS: tl.constexpr,
    CLASSES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Add the gradient of a block of the head's rows to gradient [V, D], write that of the bias; either may be None."""
    columns = tl.program_id(0) * CLASSES + tl.arange(0, CLASSES)
    sum_ = tl.zeros([CLASSES], tl.float32)
    for start in range(0, N, TOKENS):
        rows = start + tl.arange(0, TOKENS)
        label = tl.load(labels + rows, rows < N, other=-1)
        norm = tl.load(lse + rows, rows < N, other=0.0)
        factor = tl.load(share + rows, rows < N, other=0.0)
        s = _scores(
            hidden, weight, bias, rows, columns, N, V, D, hidden_row, hidden_column, weight_row, weight_column, cap,
            DTYPE, PRECISION, WIDEN, TOKENS, CLASSES, WIDTH,
        )  # fmt: skip
        g = _to_scores(s, norm, label, factor, rows, columns, N, V, smoothing, z, cap)
        sum_ += tl.sum(g, 0)
        if gradient is not None:
            for at in range(0, D, WIDTH):
                place = at + tl.arange(0, WIDTH).to(tl.int64)
                inside = (place < D)[None, :]
                h = tl.load(
                    hidden + rows.to(tl.int64)[:, None] * hidden_row + place[None, :] * hidden_column,
                    (rows < N)[:, None] & inside,
                    other=0.0,
                )
                change = _product(tl.trans(g), h.to(DTYPE), PRECISION, WIDEN, CLASSES, WIDTH)
                mine = (columns < V)[:, None] & inside
                goal = gradient + columns.to(tl.int64)[:, None] * D + place[None, :]
                tl.store(goal, tl.load(goal, mine, other=0.0) + change, mine)
            tl.debug_barrier()
    if bias_gradient is not None:
        tl.store(bias_gradient + columns, sum_, columns < V)


_INTERPRETED = triton is not None and not isinstance(_forward_kernel, triton.JITFunction)


class TritonCutCrossEntropy(torch.autograd.Function):
    """loss_i, [N], from hidden [N, D], weight [V, D], bias [V] or None and labels [N]; blocks are computed again."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, head: Head) -> Tensor:
        tokens, classes = hidden.shape[0], weight.shape[0]
        range_, ranges = _ranges(tokens, classes, _PROGRAMS)
        lse, chosen, total = hidden.new_empty(3, ranges, tokens, dtype=torch.float32)
        if tokens:
            with torch.cuda.device_of(hidden):
                _forward_kernel[-(-tokens // _TOKENS), ranges](
                    *(hidden, weight, bias, labels, lse, chosen, total),
                    *_sizes(hidden, weight),
                    head.soft_cap,
                    RANGE=range_,
                    **_constants(hidden, weight),
                )
        lse_N = lse.logsumexp(0)
        ctx.head = head
        ctx.save_for_backward(hidden, weight, bias, labels, lse_N)
        return _values(lse_N, chosen.sum(0), total.sum(0) if head.label_smoothing else total[0], classes, head)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, labels, lse_N = ctx.saved_tensors
        head, (tokens, classes) = ctx.head, (hidden.shape[0], weight.shape[0])
        needed = [each if need else None for each, need in zip((hidden, weight, bias), ctx.needs_input_grad)]
        if not tokens:
            return (*(None if each is None else torch.zeros_like(each) for each in needed), None, None)
        # As shares of the largest, gradients in scores are in the range of half precision, however small they are.
        largest = (grad_N.abs() * (1 + 2 * head.z_loss * lse_N.abs())).amax().clamp(min=1e-30)
        share_N = (grad_N / largest).contiguous()
        inputs = (hidden, weight, bias, labels, lse_N, share_N)
        options = (*_sizes(hidden, weight), head.label_smoothing, head.z_loss, head.soft_cap)
        constants = _constants(hidden, weight)
        of_hidden, of_weight, of_bias = None, None, None
        with torch.cuda.device_of(hidden):
            if needed[0] is not None:
                range_, ranges = _ranges(tokens, classes, _PROGRAMS // 4)
                parts = hidden.new_zeros(ranges, *hidden.shape, dtype=torch.float32)
                grid = (-(-tokens // _TOKENS), ranges)
                _hidden_kernel[grid](*inputs, parts, *options, RANGE=range_, **constants)
                of_hidden = parts.sum(0) if ranges > 1 else parts[0]
            if needed[1] is not None or needed[2] is not None:
                of_weight = None if needed[1] is None else torch.zeros(
                    weight.shape, dtype=torch.float32, device=weight.device
                )
                of_bias = None if needed[2] is None else weight.new_empty(classes, dtype=torch.float32)
                _weight_kernel[(-(-classes // _CLASSES),)](*inputs, of_weight, of_bias, *options, **constants)
        pairs = zip((of_hidden, of_weight, of_bias), needed)
        return (*(None if each is None else each.mul_(largest).to(of.dtype) for each, of in pairs), None, None)


def use_triton(backend: str, hidden: Tensor, weight: Tensor) -> bool:
    """Return whether a head's loss is to be computed by the kernels.

    Raises:
        MissingExtraError: if they were asked for and Triton is not installed.
        UsageError: if they were asked for tensors that they cannot take.
    """
    where = {hidden.device.type, weight.device.type}
    fits = hidden.dtype in _DTYPES and weight.dtype in _DTYPES
    if backend != "triton":
        return backend == "auto" and where == {"cuda"} and fits and triton is not None
    if triton is None:
        raise MissingExtraError("triton is not installed: run pip install triton.")
    if where != {"cuda"} and not _INTERPRETED:
        raise UsageError(
            f'backend "triton" needs tensors on a GPU, got {" and ".join(sorted(where))}: use backend="torch", or set '
            "TRITON_INTERPRET=1 before the first import."
        )
    if not fits:
        raise UsageError(
            f'backend "triton" computes in float32, got {hidden.dtype} and {weight.dtype}: use backend="torch".'
        )
    return True


def _ranges(tokens: int, classes: int, programs: int) -> tuple[int, int]:
    """Return the size of a range of classes, a multiple of a block, and the number of ranges."""
    blocks = -(-classes // _CLASSES)
    wanted = max(1, min(blocks, programs * _TOKENS // max(1, tokens)))
    size = -(-blocks // wanted)
    return size * _CLASSES, -(-blocks // size)


def _sizes(hidden: Tensor, weight: Tensor) -> tuple[int, ...]:
    """Return N, V, D and the strides of both."""
    return (hidden.shape[0], *weight.shape, *hidden.stride(), *weight.stride())


def _constants(hidden: Tensor, weight: Tensor) -> dict[str, Any]:
    """Return what the kernels are compiled for."""
    dtype = torch.promote_types(hidden.dtype, weight.dtype)
    names = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
    return {
        "DTYPE": names[dtype],
        # As torch multiplies float32 on this GPU.
        "PRECISION": "ieee" if torch.get_float32_matmul_precision() == "highest" or torch.version.hip else "tf32",
        "WIDEN": _INTERPRETED and dtype == torch.bfloat16,
        "TOKENS": _TOKENS,
        "CLASSES": _CLASSES,
        "WIDTH": 32 if dtype == torch.float32 else 64,
    }
