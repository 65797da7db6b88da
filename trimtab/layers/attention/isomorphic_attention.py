"""GIN-attention (graph-aware isomorphic attention): heads that run a graph network on the graph their attention spans.

Attention is a sum over neighbours of values that are linear in x. Here there are no values: in each head the attention
weights A are the edges of a graph, whose nodes hold that head's share of x, and a graph isomorphism network (GIN) with
an MLP of its own makes the head's output:

    A = softmax( tau q k^T / sqrt(K) )        h'_i = MLP( (1 + eps) h_i + sum_j A_ij h_j )
    MLP(z) = W_2 SiLU( RMSNorm(W_1 z + b_1) ) + b_2

Buehler 2025, arXiv:2501.02393; GIN: Xu et al. 2019, arXiv:1810.00826.

Shape suffixes: B batch, L length, D width, H heads, K width of a head, M width of the MLP.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.card import Card, Default, Experiment, Paper
from trimtab.errors import UsageError
from trimtab.layers._self_attention import ConvertedAttention, attentions, revert_all

__all__ = ["GINAttention", "GINCore"]


class GINCore(nn.Module):
    """What takes the place of softmax(q k^T / sqrt(K)) v: h' = MLP((1 + eps) h + A h), a GIN in each head.

    Args:
        heads: H.
        head_dim: K.
        multiplier: width of a head's MLP, as a multiple of K.
        sharpness: initial value of tau, which multiplies the logits and is learned.
        dropout: rate inside the MLP, from 0 to 1.
        norm_eps: of the RMSNorm inside the MLP, above 0.
        device: of the parameters.
        dtype: of the parameters.

    Shapes: queries, keys and nodes [B, H, L, K]; the result too.

    Raises:
        UsageError: if an argument breaks its rule.

    Example:
        >>> q = torch.ones(1, 2, 3, 4)
        >>> GINCore(2, 4)(q, q, q, causal=True).shape
        torch.Size([1, 2, 3, 4])

    References:
        Buehler 2025, arXiv:2501.02393.
    """

    def __init__(
        self,
        heads: int,
        head_dim: int,
        *,
        multiplier: float = 2.0,
        sharpness: float = 1.0,
        dropout: float = 0.1,
        norm_eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        inner = int(multiplier * head_dim)
        if inner < 1:
            raise UsageError(f"multiplier must give an MLP of width 1 or more, got {multiplier} of {head_dim}.")
        if not 0 <= dropout < 1:
            raise UsageError(f"dropout must be at least 0 and below 1, got {dropout}: 0.1 is the default.")
        if not norm_eps > 0:
            raise UsageError(f"norm_eps must be above 0, got {norm_eps}: 1e-5 is the default.")
        where: dict[str, Any] = {"device": device, "dtype": dtype}

        def uniform(*shape: int, fan_in: int) -> nn.Parameter:
            bound = 1 / math.sqrt(fan_in)
            return nn.Parameter(torch.empty(shape, **where).uniform_(-bound, bound))

        self.weight1, self.bias1 = (
            uniform(heads, head_dim, inner, fan_in=head_dim),
            uniform(heads, 1, inner, fan_in=head_dim),
        )
        self.weight2, self.bias2 = (
            uniform(heads, inner, head_dim, fan_in=inner),
            uniform(heads, 1, head_dim, fan_in=inner),
        )
        self.gain = nn.Parameter(torch.ones(heads, 1, inner, **where))
        self.eps = nn.Parameter(torch.zeros(heads, 1, 1, **where))
        self.sharpness = nn.Parameter(torch.full((1,), float(sharpness), **where))
        self.dropout, self.norm_eps = nn.Dropout(dropout), norm_eps

    def forward(self, q_BHLK: Tensor, k_BHLK: Tensor, h_BHLK: Tensor, *, causal: bool) -> Tensor:
        """Return the heads' outputs, [B, H, L, K]; `causal` keeps a node from what is behind it."""
        length = q_BHLK.shape[-2]
        logits = self.sharpness * (q_BHLK @ k_BHLK.transpose(-1, -2)) / math.sqrt(q_BHLK.shape[-1])
        if causal:
            future = torch.ones(length, length, dtype=torch.bool, device=logits.device).triu(1)
            logits = logits.masked_fill(future, float("-inf"))
        dtype = torch.promote_types(logits.dtype, torch.float32)
        attention_BHLL = logits.softmax(-1, dtype=dtype).to(h_BHLK.dtype)
        z = (1 + self.eps) * h_BHLK + attention_BHLL @ h_BHLK
        z_BHLM = self.dropout(z @ self.weight1 + self.bias1).to(dtype)
        z_BHLM = (F.rms_norm(z_BHLM, (z_BHLM.shape[-1],), eps=self.norm_eps) * self.gain).to(h_BHLK.dtype)
        return (F.silu(z_BHLM) @ self.weight2 + self.bias2).to(h_BHLK.dtype)


class GINAttention(nn.Module):
    """Self-attention without values and output projection: projections of q and k, then a GIN in each head.

    Args:
        width: D, a multiple of `heads`.
        heads: H.
        causal: whether a position sees only itself and what is before it.
        multiplier: width of a head's MLP, as a multiple of K.
        sharpness: initial value of tau, which multiplies the logits and is learned.
        dropout: rate inside the MLP, from 0 to 1.
        norm_eps: of the RMSNorm inside the MLP, above 0.

    Shapes: [B, L, D] in and out.

    Raises:
        UsageError: if an argument breaks its rule.

    Example:
        >>> GINAttention(8, 2, causal=True)(torch.ones(1, 3, 8)).shape
        torch.Size([1, 3, 8])

    References:
        Buehler 2025, arXiv:2501.02393; the authors' code, https://github.com/lamm-mit/Graph-Aware-Transformers,
        src/xgpt/Attention_GNN.py (LlamaAttentionGIN).
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        causal: bool,
        multiplier: float = 2.0,
        sharpness: float = 1.0,
        dropout: float = 0.1,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        if heads < 1 or width < 1 or width % heads:
            raise UsageError(f"width must be a multiple of heads, got {width} and {heads}.")
        self.num_heads, self.causal = heads, causal
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.gin = GINCore(
            heads, width // heads, multiplier=multiplier, sharpness=sharpness, dropout=dropout, norm_eps=norm_eps
        )

    def forward(self, x_BLD: Tensor) -> Tensor:
        """Return the graph networks' outputs side by side, [B, L, D]."""
        q, k, h = (_heads(part, self.num_heads) for part in (self.q_proj(x_BLD), self.k_proj(x_BLD), x_BLD))
        return self.gin(q, k, h, causal=self.causal).transpose(1, 2).flatten(-2)


class _ConvertedGIN(ConvertedAttention):
    """Self-attention whose core became a GIN in each head: it keeps its projections, and makes no use of its values."""

    parts: ClassVar[tuple[str, ...]] = ("gin",)

    def setup(self, **options: Any) -> None:
        """Add the graph networks."""
        if self.qkv.weight.shape[1] != self.num_heads * self.head_dim:
            raise UsageError("gin-attention: the heads must share the width of the attention's input evenly.")
        where: dict[str, Any] = {"device": self.qkv.weight.device, "dtype": self.qkv.weight.dtype}
        self.gin = GINCore(self.num_heads, self.head_dim, **where, **options)

    def attend(self, q_BHLK: Tensor, k_BHLK: Tensor, v_BHLK: Tensor, x_BLD: Tensor) -> Tensor:
        """Return the heads' outputs, [B, H, L, K]; the nodes are what the layer was given."""
        return self.gin(q_BHLK, k_BHLK, _heads(x_BLD, self.num_heads), causal=self.causal)


def _heads(x_BLD: Tensor, heads: int) -> Tensor:
    return x_BLD.unflatten(-1, (heads, x_BLD.shape[-1] // heads)).transpose(1, 2)


def _apply(
    model: nn.Module,
    *,
    multiplier: float = 2.0,
    sharpness: float = 1.0,
    dropout: float = 0.1,
    norm_eps: float = 1e-5,
) -> dict[str, str]:
    """Put a GIN into every head of every attention that is recognised; options as those of `GINAttention`."""
    sites = attentions(model, "gin-attention")
    for module in sites.values():
        _ConvertedGIN.convert(module, multiplier=multiplier, sharpness=sharpness, dropout=dropout, norm_eps=norm_eps)
    return dict.fromkeys(sites, "a GIN in each head; qkv (without its values) and proj kept, the MLPs new: train it")


def _remove(model: nn.Module) -> dict[str, str]:
    """Put softmax attention back."""
    return revert_all(model, _ConvertedGIN, "softmax attention again")


CARD = Card(
    name="gin-attention",
    room="layers",
    summary="attention without values: a graph network in each head, on the graph that its attention weights span",
    paper=Paper(
        "Graph-Aware Isomorphic Attention for Adaptive Dynamics in Transformers",
        2025,
        arxiv="2501.02393",
        code="https://github.com/lamm-mit/Graph-Aware-Transformers",
    ),
    equation="h' = MLP( (1 + eps) h + A h ) in each head, A = softmax(tau q k^T / sqrt(K)), h the head's share of x",
    claim="Lower validation loss and a smaller gap between training and validation loss than standard attention.",
    acts_on="model",
    entry="trimtab.layers.attention.isomorphic_attention:GINAttention",
    defaults=(
        Default("multiplier", 2.0, "authors' code (attention_GIN_MLP_multiplier); their README's example has 0.5"),
        Default("sharpness", 1.0, "authors' code (initial_sharpening_value)"),
        Default("dropout", 0.1, "authors' README; the code's own default is 0.2"),
        Default("norm_eps", 1e-5, "authors' README (rms_norm_eps)"),
    ),
    verified={
        "equation": (
            "tests/layers/attention/test_isomorphic_attention.py::test_equals_the_loop",
            "tests/layers/attention/test_isomorphic_attention.py::test_identity_mlp_is_attention_over_nodes",
        ),
    },
    deviations=(
        "GIN's self term is (1 + eps) h, as in the paper; the authors' code has eps h.",
        "No rotary positions, scoring network, differential attention or thresholds, which are options of the authors' "
        "code.",
        "The authors' recipe has no projection behind the heads, and neither has GINAttention; applied to a model the "
        "model's own proj stays (attention_GIN_MLP_o_proj_at_end of the authors' code), and so do the rows of qkv that "
        "made values, unused.",
        "The paper was read through its abstract and figures' captions; the equations are from the authors' code.",
    ),
    experiments=(
        Experiment(
            "lm-small",
            "steps=200",
            "steps=200,with=gin-attention",
            outcome="no evidence: 2.556 to 2.521, difference -0.035 (95 % interval -0.089 to +0.020), n=5",
        ),
    ),
    apply=_apply,
    remove=_remove,
)
