"""Gated linear attention (GLA): linear attention whose state forgets by data-dependent gates, one for each key channel.

The state of a head is a matrix S [K, V]; alpha_t in (0, 1)^K is computed from the input at t:

    S_t = diag(alpha_t) S_{t-1} + k_t v_t^T        o_t = S_t^T q_t

Inside a chunk this is attention with weights sum_c q_ic k_jc prod_{j < t <= i} alpha_tc, so a sequence costs one matrix
product after another instead of one step after another, and cost grows linearly with its length. Weights of two places
in one sub-chunk are computed channel by channel; those of a place and an earlier sub-chunk as a matrix product of
q_i prod(alpha from the sub-chunk's start to i) and k_j prod(alpha from j to that start), whose factors are at most 1.

Yang et al. 2023, arXiv:2312.06635.

Shape suffixes: B batch, L length, D width, H heads, K width of a key, V width of a value, N chunks, S sub-chunks of a
chunk, M places of a sub-chunk.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.card import Card, Default, Experiment, Paper
from trimtab.errors import UsageError
from trimtab.layers._self_attention import ConvertedAttention, revert_all
from trimtab.layers.linear._linear_attention import (
    GatedHeadNorm,
    ShortConvolution,
    along,
    check_chunk,
    check_shapes,
    check_state,
    join_heads,
    like,
    prefix_sums,
    span_sums,
    split_chunks,
    split_heads,
    suffix_sums,
    swap_attention,
    widths,
    working,
)

__all__ = ["GatedLinearAttention", "gated_linear_attention", "recurrent_gated_linear_attention"]


def gated_linear_attention(
    q: Tensor, k: Tensor, v: Tensor, log_alpha: Tensor, *, initial_state: Tensor | None = None, chunk: int = 64
) -> tuple[Tensor, Tensor]:
    """Return o_t = S_t^T q_t with S_t = diag(alpha_t) S_{t-1} + k_t v_t^T, computed chunk by chunk.

    Computed in float32 or better, under autocast too. Gates may be as small as they like, 0 (log_alpha = -inf) too.

    Args:
        q: queries, [B, H, L, K].
        k: keys, [B, H, L, K].
        v: values, [B, H, L, V].
        log_alpha: logarithms of the gates, at most 0, [B, H, L, K].
        initial_state: S_0, [B, H, K, V]; None is zero.
        chunk: places in a chunk, at least 1; rounded up to a multiple of its sub-chunks' length, about its root.

    Returns:
        The output [B, H, L, V] in v's dtype, and the last state [B, H, K, V] in the dtype computed in.

    Raises:
        UsageError: if shapes do not fit together, or `chunk` is below 1.

    Example:
        >>> q = k = v = torch.ones(1, 1, 3, 1)
        >>> o, state = gated_linear_attention(q, k, v, torch.full((1, 1, 3, 1), 0.5).log())
        >>> [round(x, 2) for x in o.flatten().tolist()], round(float(state), 2)
        ([1.0, 1.5, 1.75], 1.75)

    References:
        Yang et al. 2023, arXiv:2312.06635, section 4.
    """
    check_shapes(q, k, v, {"log_alpha": (log_alpha, tuple(q.shape))}, chunk)
    dtype, length = v.dtype, q.shape[2]
    with torch.autocast(q.device.type, enabled=False):
        q, k, v, g = working(q, k, v, log_alpha)
        state = check_state(initial_state, k, v)
        size = math.isqrt(max(1, min(chunk, length)) - 1) + 1
        parts = -(-min(chunk, length) // size) or 1
        q, k, v, g = (split_chunks(x, parts * size).unflatten(3, (parts, size)) for x in (q, k, v, g))
        total = g.sum(4)  # [B, H, N, S, K]
        spans = span_sums(g)
        from_start, to_end = g.cumsum(4), spans[..., -1, :, :]
        o = _same_part(q, k, v, spans) + _earlier_parts(q * from_start.exp(), k, v, to_end, total)
        o = o.flatten(3, 4)

        q = (q * (from_start + prefix_sums(total, 3).unsqueeze(4)).exp()).flatten(3, 4)
        k = (k * (to_end + suffix_sums(total, 3).unsqueeze(4)).exp()).flatten(3, 4)
        added = k.transpose(-1, -2) @ v.flatten(3, 4)
        kept = total.sum(3).exp().unsqueeze(-1)
        carried = []
        for q_n, kept_n, added_n in along(2, q, kept, added):
            carried.append(q_n @ state)
            state = kept_n * state + added_n
        o = (o + torch.stack(carried, 2)).flatten(2, 3)[:, :, :length]
    return o.to(dtype), state


def _same_part(q: Tensor, k: Tensor, v: Tensor, spans: Tensor) -> Tensor:
    """Return what places of the same sub-chunk give, [B, H, N, S, M, V]: one product for each pair and channel."""
    weights = (q.unsqueeze(-2) * k.unsqueeze(-3) * spans.exp()).sum(-1)
    return weights @ v


def _earlier_parts(q: Tensor, k: Tensor, v: Tensor, to_end: Tensor, total: Tensor) -> Tensor:
    """Return what earlier sub-chunks of the same chunk give, [B, H, N, S, M, V]; q is decayed from its own start."""
    between = span_sums(total, inclusive=False)  # [B, H, N, S (of i), S (of j), K]
    k = (k.unsqueeze(3) * (to_end.unsqueeze(3) + between.unsqueeze(-2)).exp()).flatten(4, 5)
    return q @ k.transpose(-1, -2) @ v.flatten(3, 4).unsqueeze(3)


def recurrent_gated_linear_attention(
    q: Tensor, k: Tensor, v: Tensor, log_alpha: Tensor, *, initial_state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return what `gated_linear_attention` does, computed step by step: the definition, and the form for decoding.

    Args:
        q: queries, [B, H, L, K].
        k: keys, [B, H, L, K].
        v: values, [B, H, L, V].
        log_alpha: logarithms of the gates, at most 0, [B, H, L, K].
        initial_state: S_0, [B, H, K, V]; None is zero.

    Returns:
        The output [B, H, L, V] in v's dtype, and the last state [B, H, K, V] in the dtype computed in.

    Raises:
        UsageError: if shapes do not fit together.

    Example:
        >>> one = torch.ones(1, 1, 2, 1)
        >>> o, state = recurrent_gated_linear_attention(one, one, one, torch.zeros(1, 1, 2, 1))
        >>> o.flatten().tolist()
        [1.0, 2.0]

    References:
        Yang et al. 2023, arXiv:2312.06635, section 4.
    """
    check_shapes(q, k, v, {"log_alpha": (log_alpha, tuple(q.shape))}, 1)
    dtype = v.dtype
    with torch.autocast(q.device.type, enabled=False):
        q, k, v, g = working(q, k, v, log_alpha)
        state = check_state(initial_state, k, v)
        outputs = [v[:, :, :0]]
        for q_t, k_t, v_t, g_t in along(2, q, k, v, g):
            state = g_t.exp().unsqueeze(-1) * state + k_t.unsqueeze(-1) * v_t.unsqueeze(-2)
            outputs.append(q_t.unsqueeze(-2) @ state)
        return torch.cat(outputs, 2).to(dtype), state


class _Gate(nn.Sequential):
    """log alpha = log sigmoid(x W1 W2 + b) / tau, through a low rank."""

    def __init__(self, width: int, keys: int, rank: int, tau: float, **where: Any) -> None:
        if rank < 1:
            raise UsageError(f"gate_rank must be at least 1, got {rank}: 16 is the default.")
        if not tau > 0:
            raise UsageError(f"tau must be above 0, got {tau}: 16 is the default.")
        super().__init__(nn.Linear(width, rank, bias=False, **where), nn.Linear(rank, keys, **where))
        self.tau = tau

    def forward(self, x: Tensor) -> Tensor:
        (logits,) = working(super().forward(x))
        return F.logsigmoid(logits) / self.tau


class GatedLinearAttention(nn.Module):
    """A token-mixing layer: y = W_o [ RMSNorm(o) * swish(W_r x) ], with o the gated linear attention of its heads.

    alpha_t = sigmoid(W_2 W_1 x_t + b)^(1 / tau). It is causal, and knows positions by its gates alone.

    Args:
        width: D.
        heads: H.
        expand_k: width of all keys, as a share of D.
        expand_v: width of all values, as a share of D.
        gate_rank: rank of the gates' projection, at least 1.
        tau: divides the gates' logarithms, above 0; larger forgets more slowly.
        short_conv: positions that a convolution with SiLU on q, k and v covers; 0 is none.
        chunk: places in a chunk, at least 1.
        eps: of the heads' RMSNorm, above 0.

    Shapes: [B, L, D] in and out.

    Raises:
        UsageError: if an argument breaks its rule.

    Example:
        >>> layer, x = GatedLinearAttention(8, 2), torch.ones(1, 5, 8)
        >>> start, state = layer.advance(x[:, :3])
        >>> rest, state = layer.advance(x[:, 3:], state)
        >>> torch.allclose(torch.cat([start, rest], 1), layer(x), atol=1e-6)
        True

    References:
        Yang et al. 2023, arXiv:2312.06635, section 4.4; the authors' code,
        https://github.com/fla-org/flash-linear-attention, fla/layers/gla.py.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        expand_k: float = 0.5,
        expand_v: float = 1.0,
        gate_rank: int = 16,
        tau: float = 16.0,
        short_conv: int = 0,
        chunk: int = 64,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        keys, values = widths(width, heads, expand_k, expand_v)
        check_chunk(chunk)
        self.num_heads, self.chunk = heads, chunk
        self.sizes = (keys, keys, values)
        self.q_proj = nn.Linear(width, keys, bias=False)
        self.k_proj = nn.Linear(width, keys, bias=False)
        self.v_proj = nn.Linear(width, values, bias=False)
        self.gate = _Gate(width, keys, gate_rank, tau)
        self.conv = ShortConvolution(2 * keys + values, short_conv) if short_conv else None
        self.output_gate = nn.Linear(width, values, bias=False)
        self.norm = GatedHeadNorm(values // heads, eps)
        self.o_proj = nn.Linear(values, width, bias=False)

    def forward(self, x_BLD: Tensor) -> Tensor:
        """Return the output of a whole sequence, [B, L, D]."""
        return self.advance(x_BLD)[0]

    def advance(self, x_BLD: Tensor, state: tuple[Tensor, ...] | None = None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return the output of the next places of a sequence, and the state behind them to go on from."""
        qkv = torch.cat([self.q_proj(x_BLD), self.k_proj(x_BLD), self.v_proj(x_BLD)], dim=-1)
        memory, rest = (None, ()) if state is None else (state[0], state[1:])
        if self.conv is not None:
            qkv, seen = self.conv(qkv, *rest)
            rest = (seen,)
        q, k, v = (split_heads(part, self.num_heads) for part in qkv.split(self.sizes, dim=-1))
        log_alpha = split_heads(self.gate(x_BLD), self.num_heads)
        q = q * q.shape[-1] ** -0.5
        o, memory = gated_linear_attention(q, k, v, log_alpha, initial_state=memory, chunk=self.chunk)
        return self.o_proj(join_heads(self.norm(o, self.output_gate(x_BLD)))), (memory, *rest)


class _ConvertedGLA(ConvertedAttention):
    """Self-attention whose core became GLA: it keeps its projections; gates, output gate and norm are new."""

    parts: ClassVar[tuple[str, ...]] = ("gla_gate", "gla_output_gate", "gla_norm", "chunk")

    def setup(self, *, gate_rank: int, tau: float, chunk: int, eps: float) -> None:
        """Add the gates and the norm."""
        where: dict[str, Any] = like(self)
        width = self.num_heads * self.head_dim
        gate, norm = _Gate(width, width, gate_rank, tau, **where), GatedHeadNorm(self.head_dim, eps, **where)
        check_chunk(chunk)
        self.gla_gate, self.gla_norm, self.chunk = gate, norm, chunk
        self.gla_output_gate = nn.Linear(width, width, bias=False, **where)

    def attend(self, q_BHLK: Tensor, k_BHLK: Tensor, v_BHLK: Tensor, x_BLD: Tensor) -> Tensor:
        """Return the heads' outputs, [B, H, L, K]."""
        log_alpha = split_heads(self.gla_gate(x_BLD), self.num_heads)
        q_BHLK = q_BHLK * self.head_dim**-0.5
        o, _ = gated_linear_attention(q_BHLK, k_BHLK, v_BHLK, log_alpha, chunk=self.chunk)
        return self.gla_norm(o, self.gla_output_gate(x_BLD))


def _apply(
    model: nn.Module, *, gate_rank: int = 16, tau: float = 16.0, chunk: int = 64, eps: float = 1e-5
) -> dict[str, str]:
    """Put GLA in place of every causal attention that is recognised; options as those of `GatedLinearAttention`."""
    what = "gated linear attention; qkv and proj kept, gates, output gate and norm new: train it"
    return swap_attention(model, "gla", _ConvertedGLA, what, gate_rank=gate_rank, tau=tau, chunk=chunk, eps=eps)


def _remove(model: nn.Module) -> dict[str, str]:
    """Put softmax attention back."""
    return revert_all(model, _ConvertedGLA, "softmax attention again")


CARD = Card(
    name="gla",
    room="layers",
    summary="gated linear attention: a state that forgets by data-dependent gates, computed in chunks at linear cost",
    paper=Paper(
        "Gated Linear Attention Transformers with Hardware-Efficient Training",
        2023,
        arxiv="2312.06635",
        code="https://github.com/fla-org/flash-linear-attention",
    ),
    equation="S_t = diag(alpha_t) S_{t-1} + k_t v_t^T, o_t = S_t^T q_t, alpha_t = sigmoid(W_2 W_1 x_t + b)^(1 / tau)",
    claim=(
        "Competitive with LLaMA-style attention and Mamba at 340M and 1.3B parameters, and (recalled) better at recall "
        "than linear attention without data-dependent gates; trains faster than FlashAttention-2 beyond length 4096."
    ),
    acts_on="model",
    entry="trimtab.layers.linear.gla:GatedLinearAttention",
    defaults=(
        Default("expand_k", 0.5, "paper, section 4.4: d_k = d / 2; authors' code"),
        Default("expand_v", 1.0, "paper, section 4.4: d_v = d; authors' code"),
        Default("gate_rank", 16, "paper, section 4.4; authors' code (gate_low_rank_dim)"),
        Default("tau", 16.0, "paper, section 4.4; authors' code (gate_logit_normalizer)"),
        Default("short_conv", 0, "authors' code: use_short_conv=False"),
        Default("chunk", 64, "authors' code: chunks of 64, in sub-chunks of 16"),
        Default("eps", 1e-5, "authors' code (norm_eps)"),
    ),
    verified={
        "equation": (
            "tests/layers/linear/test_gla.py::test_both_forms_equal_the_loop",
            "tests/layers/linear/test_gla.py::test_gradients_equal_those_of_the_recurrence",
            "tests/layers/linear/test_gla.py::test_gates_near_zero_stay_finite_and_exact",
        ),
        "reference": ("tests/layers/linear/test_gla.py::test_without_gates_it_is_linear_attention",),
    },
    deviations=(
        "The paper normalises each head with LayerNorm and gives the output gate a bias; as in the authors' code it is "
        "RMSNorm here, and the gate has no bias.",
        "The authors multiply o by K^(-1/2) inside the kernel; here the layer scales q and the function follows the "
        "equation.",
        "Sub-chunks have about sqrt(chunk) places, 8 of 64, not 16. Spans of log-gates are summed one by one instead "
        "of being differences of running sums, so that gates of 0 are exact; the price is a tensor of "
        "[L, sqrt(chunk), K] a head.",
        "Linear layers start as torch's do; the gates' projection too.",
        "Applied to a model it keeps qkv and proj, so keys are as wide as values (expand_k = 1); the function changes, "
        "and the model has to be trained.",
        "The paper's section numbers are recalled; the defaults are those of the authors' code, read.",
    ),
    experiments=(
        Experiment(
            "trimtab.studies.recall:recall",
            "mixer=linear,lr=0.01",
            "mixer=gla,lr=0.01",
            metric="accuracy",
            higher_is_better=True,
            mechanism="loss",
            outcome=(
                "worse: 0.624 to 0.551, difference -0.0734 (95 % interval -0.114 to -0.0325), n=5; loss 1.28 to 1.56"
            ),
        ),
    ),
    apply=_apply,
    remove=_remove,
)
