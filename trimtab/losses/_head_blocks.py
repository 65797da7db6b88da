"""Cross-entropy of a linear head by blocks: the two ways of cut cross-entropy, as autograd functions.

Shape suffixes: N tokens, D width, V classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trimtab.errors import UsageError

_LOGITS_AT_ONCE = 2**23
"""Logits of a block if the caller gives no size: 32 MiB in float32."""


class Head(NamedTuple):
    """Options of the loss of a head."""

    label_smoothing: float
    z_loss: float
    soft_cap: float | None
    tokens_at_once: int | None
    classes_at_once: int


class CutCrossEntropy(torch.autograd.Function):
    """loss_i, [N], from hidden [N, D], weight [V, D], bias [V] or None and labels [N]; blocks are computed twice."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, head: Head) -> Tensor:
        wide = _wide(hidden, weight)
        lse_N = hidden.new_empty(hidden.shape[0], dtype=wide)
        values_N = torch.empty_like(lse_N)
        with torch.autocast(hidden.device.type, enabled=False):
            for rows in _blocks(hidden.shape[0], _tokens(head, min(head.classes_at_once, weight.shape[0]))):
                h = hidden[rows].to(wide)
                lse = h.new_full((h.shape[0],), -torch.inf)
                chosen, total = torch.zeros_like(lse), torch.zeros_like(lse)
                for columns in _blocks(weight.shape[0], head.classes_at_once):
                    s = _scores(h, weight[columns], None if bias is None else bias[columns], head.soft_cap)
                    lse = torch.logaddexp(lse, s.logsumexp(-1))
                    here, place = _labels_in(labels[rows], columns)
                    chosen += torch.where(here, s.gather(-1, place).squeeze(-1), torch.zeros_like(lse))
                    total += s.sum(-1) if head.label_smoothing else 0
                    del s  # not alive while the next block is made
                lse_N[rows] = lse
                values_N[rows] = _values(lse, chosen, total, weight.shape[0], head)
        ctx.head = head
        ctx.save_for_backward(hidden, weight, bias, labels, lse_N)
        return values_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, labels, lse_N = ctx.saved_tensors
        head = ctx.head
        gradients = _Gradients(hidden, weight, bias, ctx.needs_input_grad, lse_N.dtype)
        with torch.autocast(hidden.device.type, enabled=False):
            for rows in _blocks(hidden.shape[0], _tokens(head, min(head.classes_at_once, weight.shape[0]))):
                h, lse, grad = hidden[rows].to(lse_N.dtype), lse_N[rows].unsqueeze(-1), grad_N[rows].unsqueeze(-1)
                for columns in _blocks(weight.shape[0], head.classes_at_once):
                    w = weight[columns].to(lse_N.dtype)
                    change = _scores(h, w, None if bias is None else bias[columns], head.soft_cap)
                    slope = grad if head.soft_cap is None else grad * (1 - (change / head.soft_cap).square())
                    change.sub_(lse).exp_()
                    here, place = _labels_in(labels[rows], columns)
                    _to_scores(change, lse, here, place, weight.shape[0], head)
                    gradients.add(change.mul_(slope), h, w, rows, columns)
                    del change, slope  # not alive while the next block is made
        dtypes = [None if each is None else each.dtype for each in (hidden, weight, bias)]
        return (*gradients.rounded(dtypes), None, None)


class TotalCutCrossEntropy(torch.autograd.Function):
    """Sum of loss_i over the tokens that count; gradients are computed with the loss, each block once.

    As the sum's gradient is one number, those of hidden, weight and bias are known up to that factor in the forward
    pass: three matrix products as for all logits at once, where computing blocks again takes four.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, counts: Tensor, head: Head
    ) -> Tensor:
        wide = _wide(hidden, weight)
        sum_ = hidden.new_zeros((), dtype=wide)
        gradients = _Gradients(hidden, weight, bias, ctx.needs_input_grad, wide)
        with torch.autocast(hidden.device.type, enabled=False):
            tokens = _tokens(head, weight.shape[0])
            block = hidden.new_empty(min(tokens, hidden.shape[0]), weight.shape[0], dtype=wide)
            # Only a weight of another dtype is worth taking in parts, which are converted one by one.
            parts = list(_blocks(weight.shape[0], head.classes_at_once if weight.dtype != wide else len(weight)))
            for rows in _blocks(hidden.shape[0], tokens):
                h, kept = hidden[rows].to(wide), counts[rows].unsqueeze(-1).to(wide)
                s = block[: h.shape[0]]
                for columns in parts:
                    torch.mm(h, weight[columns].to(wide).T, out=s[:, columns])
                if bias is not None:
                    s += bias.to(wide)
                slope = None
                if head.soft_cap is not None:
                    s.div_(head.soft_cap).tanh_()
                    slope = 1 - s.square()
                    s.mul_(head.soft_cap)
                place = labels[rows].unsqueeze(-1)
                chosen = s.gather(-1, place).squeeze(-1)
                total = s.sum(-1) if head.label_smoothing else torch.zeros_like(chosen)
                # One exponential serves both the normaliser and its gradient.
                top = s.amax(-1, keepdim=True)
                mass = s.sub_(top).exp_().sum(-1, keepdim=True)
                lse = top + mass.log()
                values = _values(lse.squeeze(-1), chosen, total, weight.shape[0], head)
                # Left out, not multiplied by 0: a token that does not count has class 0, whose bias may be -inf.
                sum_ += torch.where(kept.squeeze(-1) > 0, values, torch.zeros_like(values)).sum()
                s.div_(mass)
                _to_scores(s, lse, kept > 0, place, weight.shape[0], head)
                s *= kept if slope is None else slope.mul_(kept)
                for columns in parts:
                    gradients.add(s[:, columns], h, weight[columns].to(wide), rows, columns)
        ctx.gradients = gradients
        ctx.dtypes = [None if each is None else each.dtype for each in (hidden, weight, bias)]
        return sum_

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise UsageError("the gradients were given away by the first backward: pass recompute=True to run more.")
        found, ctx.gradients = ctx.gradients, None
        for each in (found.hidden, found.weight, found.bias):
            if each is not None:
                each.mul_(grad)
        return (*found.rounded(ctx.dtypes), None, None, None)


class _Gradients:
    """Gradients of hidden, weight and bias that blocks add up to, each only where it is needed."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, needed: Any, wide: torch.dtype) -> None:
        self.hidden = torch.zeros_like(hidden, dtype=wide) if needed[0] else None
        self.weight = torch.zeros_like(weight, dtype=wide) if needed[1] else None
        self.bias = torch.zeros_like(bias, dtype=wide) if bias is not None and needed[2] else None

    def add(self, change: Tensor, h: Tensor, w: Tensor, rows: slice, columns: slice) -> None:
        """Add what a block of gradients in the scores gives."""
        if self.hidden is not None:
            self.hidden[rows].addmm_(change, w)
        if self.weight is not None:
            self.weight[columns].addmm_(change.T, h)
        if self.bias is not None:
            self.bias[columns] += change.sum(0)

    def rounded(self, dtypes: Sequence[torch.dtype | None]) -> tuple[Tensor | None, ...]:
        """Return the three gradients, each in the dtype of what it is of."""
        pairs = zip((self.hidden, self.weight, self.bias), dtypes, strict=True)
        return tuple(None if each is None or dtype is None else each.to(dtype) for each, dtype in pairs)


def _values(lse: Tensor, chosen: Tensor, total: Tensor, classes: int, head: Head) -> Tensor:
    """Return the loss of each token from its normaliser, its label's score and the sum of its scores."""
    smoothed = lse - (1 - head.label_smoothing) * chosen - head.label_smoothing / classes * total
    return smoothed + head.z_loss * lse.square()


def _to_scores(p: Tensor, lse: Tensor, here: Tensor, place: Tensor, classes: int, head: Head) -> None:
    """Turn probabilities into the gradient in the capped scores, in place."""
    if head.z_loss:
        p *= 1 + 2 * head.z_loss * lse
    if head.label_smoothing:
        p -= head.label_smoothing / classes
    p.scatter_add_(-1, place, -(1 - head.label_smoothing) * here.view(-1, 1).to(p.dtype))


def _wide(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """Return the dtype to compute in."""
    return torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)


def _tokens(head: Head, classes: int) -> int:
    """Return the rows of a block with so many classes."""
    return head.tokens_at_once or max(16, _LOGITS_AT_ONCE // classes)


def _blocks(size: int, step: int) -> Iterator[slice]:
    for start in range(0, size, step):
        yield slice(start, min(start + step, size))


def _scores(h: Tensor, weight: Tensor, bias: Tensor | None, cap: float | None) -> Tensor:
    """Return a block of capped logits, in the dtype of h."""
    a = h @ weight.to(h.dtype).T
    if bias is not None:
        a += bias.to(h.dtype)
    return a if cap is None else a.div_(cap).tanh_().mul_(cap)


def _labels_in(labels: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
    """Return which labels are in a block of classes, [N], and where, [N, 1] (0 for the others)."""
    here = (labels >= columns.start) & (labels < columns.stop)
    return here, torch.where(here, labels - columns.start, torch.zeros_like(labels)).unsqueeze(-1)
