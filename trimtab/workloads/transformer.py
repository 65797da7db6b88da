"""The pre-LN transformer parts that the language models and the vision transformer share.

Shape suffixes: B batch, L length, D width, H heads, K width of a head.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.errors import UsageError


class SelfAttention(nn.Module):
    """Multi-head self-attention with a fused `qkv` projection, laid out (3, H, K), and slots for QK-norm.

    Args:
        width: D, a multiple of `heads`.
        heads: H.
        causal: whether a position sees only itself and what is before it.

    Raises:
        UsageError: if the heads do not share the width evenly.
    """

    def __init__(self, width: int, heads: int, *, causal: bool) -> None:
        super().__init__()
        if width % heads:
            raise UsageError(f"a transformer's width must be a multiple of its {heads} heads, got {width}.")
        self.num_heads = heads
        self.head_dim = width // heads
        self.causal = causal
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_norm: nn.Module = nn.Identity()
        self.k_norm: nn.Module = nn.Identity()
        self.proj = nn.Linear(width, width, bias=False)

    def forward(self, x_BLD: Tensor) -> Tensor:
        """Return the attention's output, [B, L, D]."""
        batch, length, width = x_BLD.shape
        qkv = self.qkv(x_BLD).view(batch, length, 3, self.num_heads, self.head_dim)
        q_BHLK, k_BHLK, v_BHLK = qkv.permute(2, 0, 3, 1, 4)
        y_BHLK = F.scaled_dot_product_attention(self.q_norm(q_BHLK), self.k_norm(k_BHLK), v_BHLK, is_causal=self.causal)
        return self.proj(y_BHLK.transpose(1, 2).reshape(batch, length, width))


class CausalSelfAttention(SelfAttention):
    """Self-attention in which a position sees only itself and what is before it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__(width, heads, causal=True)


class Block(nn.Module):
    """A pre-LN block: x + attention(LN(x)), then x + mlp(LN(x)), with an MLP of four times the width."""

    def __init__(self, width: int, attention: nn.Module, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = attention
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width, bias=False), nn.GELU(), nn.Linear(4 * width, width, bias=False)
        )
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()

    def forward(self, x_BLD: Tensor) -> Tensor:
        """Return the block's output, [B, L, D]."""
        x_BLD = x_BLD + self.dropout(self.attention(self.norm1(x_BLD)))
        return x_BLD + self.dropout(self.mlp(self.norm2(x_BLD)))


def init_normal(module: nn.Module) -> None:
    """Draw every linear and embedding weight from N(0, 0.02), as GPT-2 does; biases become 0."""
    for part in module.modules():
        if isinstance(part, (nn.Linear, nn.Embedding)):
            nn.init.normal_(part.weight, 0.0, 0.02)
            if isinstance(part, nn.Linear) and part.bias is not None:
                nn.init.zeros_(part.bias)
