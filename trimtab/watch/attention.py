"""Attention logits from what an attention function was given, at a bounded cost.

Shape letters: B batch, H heads, L queries, S keys, D head width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

BUDGET = 2**19
"""Most logits materialised for one attention computation; beyond it, evenly spaced batch entries and queries are
taken."""


class Attention:
    """One attention computation as a probe sees it; nothing is computed before a probe asks.

    Args:
        compute: returns the logits and the share of rows that they hold.
    """

    def __init__(self, compute: Callable[[], tuple[Tensor, float]]) -> None:
        self._compute = compute

    @cached_property
    def _result(self) -> tuple[Tensor, float]:
        return self._compute()

    @property
    def logits(self) -> Tensor:
        """Scaled logits in float32, [B, H, L, S]; masked entries are -inf. B and L may be evenly spaced subsets."""
        return self._result[0]

    @property
    def sampled(self) -> float:
        """Share of the computation's (batch entry, query) rows that `logits` holds, in (0, 1]."""
        return self._result[1]


def from_products(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Attention:
    """Logits of a `scaled_dot_product_attention` call with the same arguments: scale * Q K^T + mask."""

    def compute() -> tuple[Tensor, float]:
        q_BHLD, k_BHSD = (_four_axes(tensor.detach()) for tensor in (query, key))
        batch, heads, queries, width = q_BHLD.shape
        keys = k_BHSD.shape[-2]
        k_BHSD = k_BHSD.expand(batch, *k_BHSD.shape[1:])
        entries, rows, share = _rows(batch, heads, queries, keys)
        q = q_BHLD[entries][:, :, rows].float()
        k = k_BHSD[entries].float()
        if k.shape[1] != heads:
            k = k.repeat_interleave(heads // k.shape[1], dim=1)
        logits = (q * (1 / math.sqrt(width) if scale is None else scale)) @ k.transpose(-2, -1)
        if is_causal:
            positions = torch.arange(queries, device=q.device)[rows]
            logits.masked_fill_(torch.arange(keys, device=q.device) > positions[:, None], -math.inf)
        if attn_mask is not None:
            mask = attn_mask.detach()
            mask = (mask.unsqueeze(1) if mask.ndim == 3 else mask).expand(batch, heads, queries, keys)[entries][
                :, :, rows
            ]
            logits = logits.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else logits + mask
        return logits, share

    return Attention(compute)


def from_scores(scores: Tensor, *, heads: int = 0) -> Attention:
    """Logits that a softmax was given: [B, H, L, S], or [B * H, L, S] with the number of heads if it is known."""

    def compute() -> tuple[Tensor, float]:
        scores_BHLS = scores.detach()
        if scores_BHLS.ndim == 3:
            scores_BHLS = scores_BHLS.unflatten(0, (-1, heads)) if heads else scores_BHLS.unsqueeze(1)
        batch, count, queries, keys = scores_BHLS.shape
        entries, rows, share = _rows(batch, count, queries, keys)
        logits = scores_BHLS[entries][:, :, rows].float()
        # Hand-written masks add or fill a huge negative number in place of -inf.
        return logits.masked_fill(logits <= 0.5 * _mask_value(scores.dtype), -math.inf), share

    return Attention(compute)


def _mask_value(dtype: torch.dtype) -> float:
    """The least negative fill that hand-written masks of this dtype use: -1e4 in half precision, -1e9 elsewhere."""
    return -1e4 if dtype == torch.float16 else -1e9


def _four_axes(tensor: Tensor) -> Tensor:
    """View [..., H, L, D] as [B, H, L, D], and [B, L, D] or [L, D] as one head."""
    if tensor.ndim == 2:
        return tensor[None, None]
    return tensor.unsqueeze(1) if tensor.ndim == 3 else tensor.flatten(0, tensor.ndim - 4)


def _rows(batch: int, heads: int, queries: int, keys: int) -> tuple[slice, slice, float]:
    """Choose evenly spaced batch entries, then queries, for at most BUDGET logits; the last query is kept."""
    entries = max(1, min(batch, BUDGET // max(1, heads * queries * keys)))
    step = math.ceil(batch / entries)
    rows = max(1, min(queries, BUDGET // max(1, heads * keys * math.ceil(batch / step))))
    stride = math.ceil(queries / rows)
    chosen = slice((queries - 1) % stride, None, stride)
    taken = math.ceil(batch / step) * len(range(queries)[chosen])
    return slice(None, None, step), chosen, taken / max(1, batch * queries)
