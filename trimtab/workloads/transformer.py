"""The pre-LN transformer parts that the language models and the vision transformer share.

Shape suffixes: B batch, L length, D width.
"""

from __future__ import annotations

from torch import Tensor, nn

from trimtab.layers._self_attention import SelfAttention


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
