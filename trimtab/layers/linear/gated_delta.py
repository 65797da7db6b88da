"""Gated DeltaNet: linear attention whose state decays by a gate and corrects what it holds for a key (the delta rule).

The state of a head maps keys to values; with unit keys, beta_t = 1 puts v_t in place of what k_t held, and alpha_t = 0
clears all of it. In the paper's layout, S [V, K], and in the one used here, its transpose [K, V]:

    S_t = alpha_t S_{t-1} (I - beta_t k_t k_t^T) + beta_t v_t k_t^T        o_t = S_t q_t

A chunk is computed at once: its writes u_i = beta_i (v_i - what the decayed state holds for k_i) solve a triangular
system, (I + tril(diag(beta) (K K^T * D), -1)) U = diag(beta) (V - diag(d) K S), with D_ij = alpha_{j+1} ... alpha_i and
d_i = alpha_1 ... alpha_i, solved for V and for diag(d) K before S is known (the WY form).

Yang et al. 2024, arXiv:2412.06464; the delta rule in parallel: Yang et al. 2024, arXiv:2406.06484.

Shape suffixes: B batch, L length, D width, H heads, K width of a key, V width of a value, C channels.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.card import Card, Default, Experiment, Paper
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
    span_sums,
    split_chunks,
    split_heads,
    swap_attention,
    widths,
    working,
)

__all__ = ["GatedDeltaNet", "gated_delta_rule", "recurrent_gated_delta_rule"]


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_alpha: Tensor,
    beta: Tensor,
    *,
    initial_state: Tensor | None = None,
    chunk: int = 64,
) -> tuple[Tensor, Tensor]:
    """Return o_t = S_t q_t with S_t = alpha_t S_{t-1} (I - beta_t k_t k_t^T) + beta_t v_t k_t^T, chunk by chunk.

    Computed in float32 or better, under autocast too. Keys are taken as they are: the rule is stable for unit keys.

    Args:
        q: queries, [B, H, L, K].
        k: keys, [B, H, L, K], of norm 1.
        v: values, [B, H, L, V].
        log_alpha: logarithms of the decays, at most 0, [B, H, L].
        beta: strengths of the writes, from 0 to 1, [B, H, L].
        initial_state: S_0, transposed, [B, H, K, V]; None is zero.
        chunk: places in a chunk, at least 1.

    Returns:
        The output [B, H, L, V] in v's dtype, and the last state [B, H, K, V] in the dtype computed in.

    Raises:
        UsageError: if shapes do not fit together, or `chunk` is below 1.

    Example:
        >>> one = torch.ones(1, 1, 2, 1)
        >>> v = torch.tensor([3.0, 5.0]).view(1, 1, 2, 1)
        >>> o, _ = gated_delta_rule(one, one, v, torch.zeros(1, 1, 2), torch.ones(1, 1, 2))
        >>> o.flatten().tolist()  # the second value takes the place of the first
        [3.0, 5.0]

    References:
        Yang et al. 2024, arXiv:2412.06464, section 3.
    """
    gates = {"log_alpha": (log_alpha, tuple(q.shape[:-1])), "beta": (beta, tuple(q.shape[:-1]))}
    check_shapes(q, k, v, gates, chunk)
    dtype, length = v.dtype, q.shape[2]
    with torch.autocast(q.device.type, enabled=False):
        q, k, v, g, b = working(q, k, v, log_alpha, beta)
        state = check_state(initial_state, k, v)
        size = max(1, min(chunk, length))
        q, k, v, g, b = (split_chunks(x, size) for x in (q, k, v, g.unsqueeze(-1), b.unsqueeze(-1)))
        decay = span_sums(g).squeeze(-1).exp()  # D, 0 above the diagonal
        from_start = g.cumsum(-2).exp()
        system = (b * k) @ k.transpose(-1, -2) * decay
        # Only what is below the diagonal is read; the diagonal counts as 1.
        written = torch.linalg.solve_triangular(
            system, b * torch.cat([v, from_start * k], dim=-1), upper=False, unitriangular=True
        )
        fresh, seen = written.split((v.shape[-1], k.shape[-1]), dim=-1)
        inside = q @ k.transpose(-1, -2) * decay
        q = from_start * q
        k = k * decay[..., -1, :].unsqueeze(-1)
        outputs = []
        kept = from_start[..., -1:, :]
        for q_n, k_n, fresh_n, seen_n, inside_n, kept_n in along(2, q, k, fresh, seen, inside, kept):
            u = fresh_n - seen_n @ state
            outputs.append(q_n @ state + inside_n @ u)
            state = kept_n * state + k_n.transpose(-1, -2) @ u
        o = torch.stack(outputs, 2).flatten(2, 3)[:, :, :length]
    return o.to(dtype), state


def recurrent_gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, log_alpha: Tensor, beta: Tensor, *, initial_state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return what `gated_delta_rule` does, computed step by step: the definition, and the form for decoding.

    Args:
        q: queries, [B, H, L, K].
        k: keys, [B, H, L, K], of norm 1.
        v: values, [B, H, L, V].
        log_alpha: logarithms of the decays, at most 0, [B, H, L].
        beta: strengths of the writes, from 0 to 1, [B, H, L].
        initial_state: S_0, transposed, [B, H, K, V]; None is zero.

    Returns:
        The output [B, H, L, V] in v's dtype, and the last state [B, H, K, V] in the dtype computed in.

    Raises:
        UsageError: if shapes do not fit together.

    Example:
        >>> one = torch.ones(1, 1, 2, 1)
        >>> o, state = recurrent_gated_delta_rule(one, one, one, torch.zeros(1, 1, 2), 0.5 * torch.ones(1, 1, 2))
        >>> o.flatten().tolist()
        [0.5, 0.75]

    References:
        Yang et al. 2024, arXiv:2412.06464, equation 10.
    """
    gates = {"log_alpha": (log_alpha, tuple(q.shape[:-1])), "beta": (beta, tuple(q.shape[:-1]))}
    check_shapes(q, k, v, gates, 1)
    dtype = v.dtype
    with torch.autocast(q.device.type, enabled=False):
        q, k, v, g, b = working(q, k, v, log_alpha, beta)
        state = check_state(initial_state, k, v)
        outputs = [v[:, :, :0]]
        for q_t, k_t, v_t, g_t, b_t in along(2, q, k, v, g, b):
            key = k_t.unsqueeze(-2)
            state = g_t[..., None, None].exp() * state
            u = b_t[..., None, None] * (v_t.unsqueeze(-2) - key @ state)
            state = state + key.transpose(-1, -2) @ u
            outputs.append(q_t.unsqueeze(-2) @ state)
        return torch.cat(outputs, 2).to(dtype), state


class _Decay(nn.Module):
    """log alpha = -exp(A_log) softplus(x W + dt_bias), one for each head, and beta = sigmoid(x W_b), as in Mamba2."""

    def __init__(self, width: int, heads: int, **where: Any) -> None:
        super().__init__()
        self.a_proj = nn.Linear(width, heads, bias=False, **where)
        self.b_proj = nn.Linear(width, heads, bias=False, **where)
        step = torch.empty(heads).uniform_(math.log(0.001), math.log(0.1)).exp()
        self.A_log = nn.Parameter(torch.empty(heads).uniform_(0.01, 16.0).log().to(**where))
        # softplus(dt_bias) = step
        self.dt_bias = nn.Parameter((step + torch.log(-torch.expm1(-step))).to(**where))

    def forward(self, x_BLD: Tensor) -> tuple[Tensor, Tensor]:
        a, b, rate, bias = working(self.a_proj(x_BLD), self.b_proj(x_BLD), self.A_log, self.dt_bias)
        log_alpha = rate.exp() * F.logsigmoid(-(a + bias))  # softplus(x) = -log sigmoid(-x)
        return log_alpha.transpose(1, 2), b.sigmoid().transpose(1, 2)


def _delta(q: Tensor, k: Tensor, v: Tensor, gates: tuple[Tensor, Tensor], **options: Any) -> tuple[Tensor, Tensor]:
    """Return output and state of the rule for keys and queries of norm 1, the queries then scaled as in attention."""
    q, k = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6) for x in working(q, k))
    o, state = gated_delta_rule(q * q.shape[-1] ** -0.5, k, v, *gates, **options)
    return o, state


class GatedDeltaNet(nn.Module):
    """A token-mixing layer: y = W_o [ RMSNorm(o) * swish(W_g x) ], with o the gated delta rule of its heads.

    q, k and v go through a short causal convolution with SiLU; q and k then have norm 1. alpha_t and beta_t are
    exp(-exp(A_log) softplus(w_a x_t + dt_bias)) and sigmoid(w_b x_t), one for each head.

    Args:
        width: D.
        heads: H.
        expand_k: width of all keys, as a share of D.
        expand_v: width of all values, as a share of D.
        short_conv: positions that the convolution covers, at least 1.
        chunk: places in a chunk, at least 1.
        eps: of the heads' RMSNorm, above 0.

    Shapes: [B, L, D] in and out.

    Raises:
        UsageError: if an argument breaks its rule.

    Example:
        >>> layer, x = GatedDeltaNet(8, 2), torch.ones(1, 5, 8)
        >>> start, state = layer.advance(x[:, :3])
        >>> rest, state = layer.advance(x[:, 3:], state)
        >>> torch.allclose(torch.cat([start, rest], 1), layer(x), atol=1e-6)
        True

    References:
        Yang et al. 2024, arXiv:2412.06464, section 3.4; the authors' code,
        https://github.com/fla-org/flash-linear-attention, fla/layers/gated_deltanet.py.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        expand_k: float = 0.75,
        expand_v: float = 1.5,
        short_conv: int = 4,
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
        self.conv = ShortConvolution(2 * keys + values, short_conv)
        self.decay = _Decay(width, heads)
        self.output_gate = nn.Linear(width, values, bias=False)
        self.norm = GatedHeadNorm(values // heads, eps)
        self.o_proj = nn.Linear(values, width, bias=False)

    def forward(self, x_BLD: Tensor) -> Tensor:
        """Return the output of a whole sequence, [B, L, D]."""
        return self.advance(x_BLD)[0]

    def advance(
        self, x_BLD: Tensor, state: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Return the output of the next places of a sequence, and the state behind them to go on from."""
        memory, seen = (None, None) if state is None else state
        qkv = torch.cat([self.q_proj(x_BLD), self.k_proj(x_BLD), self.v_proj(x_BLD)], dim=-1)
        qkv, seen = self.conv(qkv, seen)
        q, k, v = (split_heads(part, self.num_heads) for part in qkv.split(self.sizes, dim=-1))
        o, memory = _delta(q, k, v, self.decay(x_BLD), initial_state=memory, chunk=self.chunk)
        return self.o_proj(join_heads(self.norm(o, self.output_gate(x_BLD)))), (memory, seen)


class _ConvertedDelta(ConvertedAttention):
    """Self-attention whose core became the gated delta rule: it keeps its projections; the other parts are new."""

    parts: ClassVar[tuple[str, ...]] = ("delta_conv", "delta_decay", "delta_output_gate", "delta_norm", "chunk")

    def setup(self, *, short_conv: int, chunk: int, eps: float) -> None:
        """Add convolution, gates and norm."""
        check_chunk(chunk)
        where: dict[str, Any] = like(self)
        width = self.num_heads * self.head_dim
        conv, norm = ShortConvolution(3 * width, short_conv, **where), GatedHeadNorm(self.head_dim, eps, **where)
        self.delta_conv, self.delta_norm, self.chunk = conv, norm, chunk
        self.delta_decay = _Decay(width, self.num_heads, **where)
        self.delta_output_gate = nn.Linear(width, width, bias=False, **where)

    def attend(self, q_BHLK: Tensor, k_BHLK: Tensor, v_BHLK: Tensor, x_BLD: Tensor) -> Tensor:
        """Return the heads' outputs, [B, H, L, K]."""
        qkv, _ = self.delta_conv(torch.cat([join_heads(part) for part in (q_BHLK, k_BHLK, v_BHLK)], dim=-1))
        q, k, v = (split_heads(part, self.num_heads) for part in qkv.chunk(3, dim=-1))
        o, _ = _delta(q, k, v, self.delta_decay(x_BLD), chunk=self.chunk)
        return self.delta_norm(o, self.delta_output_gate(x_BLD))


def _apply(model: nn.Module, *, short_conv: int = 4, chunk: int = 64, eps: float = 1e-5) -> dict[str, str]:
    """Put the gated delta rule in place of every causal attention that is recognised; options as `GatedDeltaNet`'s."""
    what = "gated delta rule; qkv and proj kept, convolution, gates, output gate and norm new: train it"
    return swap_attention(model, "gated-deltanet", _ConvertedDelta, what, short_conv=short_conv, chunk=chunk, eps=eps)


def _remove(model: nn.Module) -> dict[str, str]:
    """Put softmax attention back."""
    return revert_all(model, _ConvertedDelta, "softmax attention again")


CARD = Card(
    name="gated-deltanet",
    room="layers",
    summary="linear attention that decays its state by a gate and rewrites what it holds for a key (gated delta rule)",
    paper=Paper(
        "Gated Delta Networks: Improving Mamba2 with Delta Rule",
        2024,
        arxiv="2412.06464",
        code="https://github.com/NVlabs/GatedDeltaNet",
    ),
    equation="S_t = alpha_t S_{t-1} (I - beta_t k_t k_t^T) + beta_t v_t k_t^T, o_t = S_t q_t, |k_t| = |q_t| = 1",
    claim="Consistently better than Mamba2 and DeltaNet in language modelling, retrieval in context and extrapolation.",
    acts_on="model",
    entry="trimtab.layers.linear.gated_delta:GatedDeltaNet",
    defaults=(
        Default("expand_k", 0.75, "authors' code: heads * head_dim = 0.75 width"),
        Default("expand_v", 1.5, "authors' code: values twice as wide as keys"),
        Default("short_conv", 4, "authors' code (conv_size)"),
        Default("chunk", 64, "authors' code"),
        Default("eps", 1e-5, "authors' code (norm_eps)"),
    ),
    verified={
        "equation": (
            "tests/layers/linear/test_gated_delta.py::test_both_forms_equal_the_loop",
            "tests/layers/linear/test_gated_delta.py::test_gradients_equal_those_of_the_recurrence",
            "tests/layers/linear/test_gated_delta.py::test_decay_of_one_is_the_delta_rule",
        ),
        "reference": (
            "tests/layers/linear/test_gated_delta.py::test_equals_qwen3_next",
            "tests/layers/linear/test_gated_delta.py::test_layer_equals_qwen3_next",
        ),
    },
    deviations=(
        "The state is kept as [K, V], the transpose of the paper's; the authors multiply o by K^(-1/2) inside the "
        "kernel, here the layer scales q and the function follows the equation.",
        "exp(A_log) starts uniform over (0.01, 16) as in Qwen3-Next; the authors' code draws from (0, 16), whose "
        "logarithm can be -inf. dt_bias starts as in the authors' code, from steps log-uniform over (0.001, 0.1).",
        "One convolution over q, k and v side by side stands for the authors' three; each channel has its own filter "
        "either way.",
        "Spans of log-decays are summed one by one instead of being differences of running sums: with decays around "
        "exp(-50) Qwen3-Next's chunked form in torch is off by 2e-5 in float32, and NaN where a decay is 0; this one "
        "equals the recurrence to 1e-6.",
        "The paper's negative eigenvalues (beta up to 2), grouped value heads and hybrids with sliding-window "
        "attention are not offered.",
        "Applied to a model it keeps qkv and proj, so values are as wide as keys; the function changes, and the model "
        "has to be trained.",
        "The paper's section numbers are recalled; the equations were checked against the authors' and Qwen3-Next's "
        "code.",
    ),
    experiments=(
        Experiment(
            "trimtab.studies.recall:recall",
            "mixer=gla,lr=0.01",
            "mixer=gated-deltanet,lr=0.01",
            metric="accuracy",
            higher_is_better=True,
            mechanism="loss",
            outcome=(
                "no evidence: 0.551 to 0.386, difference -0.165 (95 % interval -0.49 to 0.161), n=5; loss 1.56 to 2.27"
            ),
        ),
    ),
    apply=_apply,
    remove=_remove,
)
