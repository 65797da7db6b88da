"""nn.MultiheadAttention with a norm on its queries and keys: torch offers no place between projection and product.

Shape suffixes: B batch, L queries, S keys, E width, H heads, K width of a head.
"""

from __future__ import annotations

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.errors import UsageError


class QKNormMultiheadAttention(nn.MultiheadAttention):
    """nn.MultiheadAttention whose queries and keys pass `q_norm` and `k_norm` before the dot product.

    An existing module becomes one by `convert`: parameters, their names and hooks stay as they are. Arguments and
    results of `forward` are those of nn.MultiheadAttention; its fused inference path is not taken, as it knows no norm.
    """

    q_norm: nn.Module
    k_norm: nn.Module

    @classmethod
    def convert(cls, module: nn.MultiheadAttention, q_norm: nn.Module, k_norm: nn.Module) -> None:
        """Turn a module into one of these, in place."""
        module.__class__ = cls
        module.q_norm, module.k_norm = q_norm, k_norm
        # nn.TransformerEncoderLayer reads this flag before it takes a path that skips `forward` altogether.
        module._qkv_same_embed_dim = False

    def revert(self) -> None:
        """Turn this module back into a plain nn.MultiheadAttention, in place."""
        del self.q_norm, self.k_norm
        self._qkv_same_embed_dim = self.in_proj_weight is not None
        self.__class__ = nn.MultiheadAttention  # type: ignore[assignment]

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the attention's output and, if `need_weights`, its weights; see nn.MultiheadAttention.

        Raises:
            UsageError: if `is_causal` is given without `attn_mask`, of which it is a hint.
        """
        if is_causal and attn_mask is None:
            raise UsageError("is_causal is a hint about attn_mask: pass the causal attn_mask too.")
        batched = query.dim() == 3
        if not batched:
            query, key, value = query.unsqueeze(0), key.unsqueeze(0), value.unsqueeze(0)
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            same = query is key and key is value
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
            key, value = (query, query) if same else (key, value)

        q_BLE, k_BSE, v_BSE = self._project(query, key, value)
        if self.bias_k is not None and self.bias_v is not None:
            k_BSE = torch.cat([k_BSE, self.bias_k.expand(len(k_BSE), -1, -1)], dim=1)
            v_BSE = torch.cat([v_BSE, self.bias_v.expand(len(v_BSE), -1, -1)], dim=1)
        q_BHLK, k_BHSK, v_BHSK = (
            x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for x in (q_BLE, k_BSE, v_BSE)
        )
        q_BHLK, k_BHSK = self.q_norm(q_BHLK), self.k_norm(k_BHSK)
        if self.add_zero_attn:
            k_BHSK, v_BHSK = F.pad(k_BHSK, (0, 0, 0, 1)), F.pad(v_BHSK, (0, 0, 0, 1))

        extra = k_BHSK.shape[-2] - key.shape[1]
        whole = key_padding_mask is None and not need_weights and not extra
        mask = None if is_causal and whole else self._mask(attn_mask, key_padding_mask, q_BHLK, extra)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            logits_BHLS = q_BHLK @ k_BHSK.transpose(-2, -1) / math.sqrt(self.head_dim)
            weights = F.dropout((logits_BHLS if mask is None else logits_BHLS + mask).softmax(dim=-1), dropout)
            y_BHLK = weights @ v_BHSK
        else:
            y_BHLK = F.scaled_dot_product_attention(
                q_BHLK, k_BHSK, v_BHSK, mask, dropout, is_causal=is_causal and mask is None
            )
        y_BLE = F.linear(y_BHLK.transpose(1, 2).flatten(-2), self.out_proj.weight, self.out_proj.bias)

        if weights is not None and average_attn_weights:
            weights = weights.mean(dim=1)
        if not batched:
            return y_BLE.squeeze(0), None if weights is None else weights.squeeze(0)
        return (y_BLE if self.batch_first else y_BLE.transpose(0, 1)), weights

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        packed = cast("Tensor | None", self.in_proj_weight)
        if packed is not None and query is key and key is value:
            q_BLE, k_BSE, v_BSE = F.linear(query, packed, self.in_proj_bias).chunk(3, dim=-1)
            return q_BLE, k_BSE, v_BSE
        weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight) if packed is None else packed.chunk(3)
        q_BLE, k_BSE, v_BSE = (
            F.linear(x, weight, bias) for x, weight, bias in zip((query, key, value), weights, biases, strict=True)
        )
        return q_BLE, k_BSE, v_BSE

    def _mask(
        self, attn_mask: Tensor | None, key_padding_mask: Tensor | None, like: Tensor, extra: int
    ) -> Tensor | None:
        """Return both masks as one addend of the logits, with `extra` keys that everyone sees."""
        addend = None
        if attn_mask is not None:
            addend = _as_addend(attn_mask, like)
            if addend.dim() == 3:
                addend = addend.unflatten(0, (-1, self.num_heads))
        if key_padding_mask is not None:
            padding = _as_addend(key_padding_mask, like)[:, None, None, :]
            addend = padding if addend is None else addend + padding
        return addend if addend is None or not extra else F.pad(addend, (0, extra))


def _as_addend(mask: Tensor, like: Tensor) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(like.dtype)
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, -math.inf)
