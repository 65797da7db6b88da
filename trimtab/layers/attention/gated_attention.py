"""Gated attention: multiply what attention computes by a sigmoid gate that the position's own input sets.

Between the value and the output projection attention is linear in the values, and softmax weights sum to 1: a head that
has nothing to say must still put its weight somewhere, and learns to put it on the first token. A gate behind the sum
lets it say nothing:

    Y' = Y * sigmoid(X W),   Y = softmax(q k / sqrt(K)) v,   X the (normalised) input of the sublayer

Each head has its own gate: one for every element ("elementwise") or one in all ("headwise"). Qiu et al. 2025
(arXiv:2505.06708) call this place G1 and try four others: G2 gates the values, G3 the keys, G4 the queries, G5 the
output of the sublayer. Authors' code: qiuzh20/gated_attention, modeling_qwen3.py.

Shape suffixes: B batch, L length, D width, H heads, K width of a head.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from trimtab.card import Card, Default, Experiment, Paper
from trimtab.errors import UsageError, choose
from trimtab.layers._attention_sites import FUSED, PROJECTIONS, _head_dim
from trimtab.layers._attention_sites import _width as _output_width
from trimtab.layers._self_attention import LOOKED_FOR, ConvertedAttention, check_unsharded, converted, convertible

__all__ = ["GatedAttention", "SigmoidGate"]

_POSITIONS = {"sdpa": "G1", "value": "G2", "key": "G3", "query": "G4", "output": "G5"}
_GRANULARITIES = ("elementwise", "headwise")
_QUERIES = (*(query for query, _ in PROJECTIONS), *FUSED)
_OUTPUTS = ("o_proj", "out_proj", "c_proj", "proj", "to_out", "out_lin", "wo")
_STD = 0.02


class SigmoidGate(nn.Module):
    """The gate's values: gain * sigmoid(X W).

    Args:
        width: D, of the input.
        rows: how many values a position gets.
        preserve: start with W = 0 and gain 2, so that every gate is exactly 1; else W ~ N(0, 0.02) and gain 1.
        device: of the parameters.
        dtype: of the parameters.

    Example:
        >>> SigmoidGate(3, 2, preserve=True)(torch.ones(1, 3)).tolist()
        [[1.0, 1.0]]
    """

    def __init__(
        self,
        width: int,
        rows: int,
        *,
        preserve: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.gain = 2.0 if preserve else 1.0
        self.weight = nn.Parameter(torch.empty(rows, width, device=device, dtype=dtype))
        if preserve:
            nn.init.zeros_(self.weight)
        else:
            nn.init.normal_(self.weight, 0.0, _STD)

    def forward(self, x_BLD: Tensor) -> Tensor:
        """Return the gate of every position, [..., D] -> [..., rows]."""
        return self.gain * torch.sigmoid(nn.functional.linear(x_BLD, self.weight))

    def extra_repr(self) -> str:
        """Return the arguments."""
        return f"{self.weight.shape[1]}, {self.weight.shape[0]}, gain={self.gain}"


class GatedAttention(ConvertedAttention):
    """Self-attention with a gate: Y * sigmoid(X W), each head with rows of W of its own.

    Args:
        width: D, a multiple of `heads`.
        heads: H.
        causal: whether a position sees only itself and what is before it.
        bias: whether the projections have biases; the gate has none.
        granularity: `"elementwise"`, K gates a head, or `"headwise"`, one a head.
        position: what is gated: `"sdpa"` (G1), `"value"` (G2), `"key"` (G3), `"query"` (G4) or `"output"` (G5, which
            has no heads and so is elementwise).

    Shapes: [B, L, D] to [B, L, D].

    Raises:
        UsageError: if an argument breaks its rule.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> layer = GatedAttention(8, 2, causal=True, granularity="headwise")
        >>> layer(torch.ones(1, 3, 8)).shape, layer.attention_gate.weight.shape
        (torch.Size([1, 3, 8]), torch.Size([2, 8]))

    References:
        Qiu et al. 2025, arXiv:2505.06708, section 2.2.
    """

    parts: ClassVar[tuple[str, ...]] = ("attention_gate", "gate_position")
    attention_gate: SigmoidGate
    gate_position: str

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        causal: bool,
        bias: bool = False,
        granularity: str = "elementwise",
        position: str = "sdpa",
    ) -> None:
        super().__init__(width, heads, causal=causal, bias=bias)
        self.setup(granularity=granularity, position=position, preserve=False)

    def setup(self, *, granularity: str = "elementwise", position: str = "sdpa", preserve: bool = True) -> None:
        """Add the gate.

        Raises:
            UsageError: if an option breaks its rule.
        """
        _check(granularity, position)
        rows = {"elementwise": self.num_heads * self.head_dim, "headwise": self.num_heads}[granularity]
        if position == "output":
            rows = self.proj.out_features
        like = self.qkv.weight
        self.gate_position = position
        self.attention_gate = SigmoidGate(
            self.qkv.in_features, rows, preserve=preserve, device=like.device, dtype=like.dtype
        )

    def forward(self, x_BLD: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Return the attention's output, [B, L, D]."""
        o_BLD = super().forward(x_BLD, attn_mask, is_causal)
        return o_BLD * self.attention_gate(x_BLD) if self.gate_position == "output" else o_BLD

    def attend(self, q_BHLK: Tensor, k_BHLK: Tensor, v_BHLK: Tensor, x_BLD: Tensor) -> Tensor:
        """Return the heads' outputs, [B, H, L, K], gated at the chosen place."""
        if self.gate_position == "output":
            return super().attend(q_BHLK, k_BHLK, v_BHLK, x_BLD)
        gate_BHLK = self.attention_gate(x_BLD).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        if self.gate_position == "query":
            q_BHLK = q_BHLK * gate_BHLK
        elif self.gate_position == "key":
            k_BHLK = k_BHLK * gate_BHLK
        elif self.gate_position == "value":
            v_BHLK = v_BHLK * gate_BHLK
        y_BHLK = super().attend(q_BHLK, k_BHLK, v_BHLK, x_BLD)
        return y_BHLK * gate_BHLK if self.gate_position == "sdpa" else y_BHLK


class _HookedGate(nn.Module):
    """The gate of an output projection; what it gates with is seen at the query projection, just before."""

    def __init__(self, gate: SigmoidGate, heads: int) -> None:
        super().__init__()
        self.gate, self.heads = gate, heads
        self.x: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what a forward that broke off has left: no copy can be made of a tensor inside a graph."""
        return {**self.__dict__, "x": None}

    def forward(self, y: Tensor) -> Tensor:
        if self.x is None:
            raise UsageError("gated-attention: the output projection ran before the query projection of its attention.")
        x, self.x = self.x, None
        gate = self.gate(x)
        if self.heads:
            gate = gate.repeat_interleave(y.shape[-1] // self.heads, dim=-1)
        return y * gate.view(y.shape)


def _see(gate: _HookedGate, projection: nn.Module, args: Any) -> None:
    gate.x = args[0]


def _gate_input(projection: nn.Module, args: Any) -> Any:
    return (projection.attention_gate(args[0]), *args[1:])  # type: ignore[operator]


def _check(granularity: str, position: str) -> None:
    choose("granularity", granularity, _GRANULARITIES)
    choose("position of the gate", position, _POSITIONS)
    if position == "output" and granularity == "headwise":
        raise UsageError("the output of the sublayer has no heads: use granularity='elementwise' or another position.")


def _hookable(model: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Module, int]]:
    """Give the name, query projection, output projection and head width of every attention built of projections."""
    for name, module in model.named_modules():
        query = next((part for part in _QUERIES if _output_width(module, part)), "")
        output = next((part for part in _OUTPUTS if hasattr(module, part)), "")
        if not query or not output or isinstance(module, (nn.MultiheadAttention, GatedAttention)):
            continue
        last = getattr(module, output)
        if isinstance(last, (nn.Sequential, nn.ModuleList)) and len(last):
            last = last[0]
        elif not _output_width(module, output):
            continue
        head_dim = _head_dim(module, _width(last))
        if head_dim and _width(getattr(module, query)) and "attention_gate" not in last._modules:
            yield name, getattr(module, query), last, head_dim


def _width(projection: nn.Module) -> int:
    """Return the width of a projection's input: of nn.Linear, or of transformers' Conv1D."""
    width = getattr(projection, "in_features", None) or getattr(projection, "nx", 0)
    return width if isinstance(width, int) else 0


def _apply(
    model: nn.Module, *, granularity: str = "elementwise", position: str = "sdpa", preserve: bool = True
) -> dict[str, str]:
    """Gate every attention that is recognised.

    Args:
        model: the model to change.
        granularity: as of `GatedAttention`.
        position: as of `GatedAttention`; attention built of separate projections takes `"sdpa"` only.
        preserve: start at gates of exactly 1, which keep the model's function, in place of the paper's near 1/2.
    """
    _check(granularity, position)
    fused: dict[str, Any] = convertible(model)
    hooked = [found for found in _hookable(model) if found[0] not in fused]
    if not fused and not hooked:
        raise UsageError(
            f"gated-attention: no attention to change in {type(model).__name__}. Looked for {LOOKED_FOR}, and for "
            f"query projections with an output projection named {', '.join(_OUTPUTS)}."
        )
    check_unsharded({**fused, **{name: output for name, _, output, _ in hooked}}, "gated-attention")
    if taken := next((name for name, module in fused.items() if "attention_gate" in module.proj._modules), None):
        raise UsageError(f"gated-attention: {taken!r} has a gate in front of its proj already: remove that first.")
    if hooked and position != "sdpa":
        raise UsageError(f"gated-attention: {hooked[0][0]!r} takes position='sdpa' only: its parts are not ours.")
    what = f"{granularity} sigmoid gate at {_POSITIONS[position]} ({position})"
    for module in fused.values():
        GatedAttention.convert(module, granularity=granularity, position=position, preserve=preserve)
    for _, query, output, head_dim in hooked:
        heads = _width(output) // head_dim if granularity == "headwise" else 0
        like = next(output.parameters())
        gate = SigmoidGate(
            _width(query), heads or _width(output), preserve=preserve, device=like.device, dtype=like.dtype
        )
        output.attention_gate = _HookedGate(gate, heads)
        output.register_forward_pre_hook(_gate_input)
        query.register_forward_pre_hook(functools.partial(_see, output.attention_gate))
    return dict.fromkeys([*fused, *(name for name, *_ in hooked)], what)


def _remove(model: nn.Module) -> dict[str, str]:
    """Take the gates out again: the structure is as before `apply`, the function is that of gates of 1."""
    changes: dict[str, str] = {}
    for name, attention in converted(model, GatedAttention).items():
        attention.revert()
        changes[name] = "not gated"
    for name, module in model.named_modules():
        for handle, hook in list(module._forward_pre_hooks.items()):
            if hook is _gate_input:
                del module._forward_pre_hooks[handle], module.attention_gate
                changes[name] = "its input is not gated"
            elif getattr(hook, "func", None) is _see:
                del module._forward_pre_hooks[handle]
    return changes


CARD = Card(
    name="gated-attention",
    room="layers",
    summary="a sigmoid gate behind each attention head, so that a head with nothing to say needs no attention sink",
    paper=Paper(
        "Gated Attention for Large Language Models: Non-linearity, Sparsity, and Attention-Sink-Free",
        2025,
        arxiv="2505.06708",
        code="https://github.com/qiuzh20/gated_attention",
    ),
    equation="Y' = Y * sigmoid(X W), Y = softmax(q k / sqrt(K)) v in each head, X the sublayer's normalised input",
    claim=(
        "Better perplexity in more than 30 variants of 15B mixture-of-experts and 1.7B dense models; the first token's "
        "share of attention falls from 46.7 % to 4.8 %, activations are less massive, training has almost no loss "
        "spikes and tolerates larger learning rates."
    ),
    acts_on="model",
    entry="trimtab.layers.attention.gated_attention:GatedAttention",
    treats={"attention-sink": 1, "massive-activations": 2, "loss-spike": 6},
    defaults=(
        Default("granularity", "elementwise", "paper, section 3: the best variant; Qwen3-Next (recalled)"),
        Default("position", "sdpa", "paper, section 3: G1 is the best position"),
        Default("preserve", True, "ours: the paper trains from scratch, with gates near 1/2 at the start"),
        Default("bias", False, "authors' code, configuration_qwen3.py: attention_bias=False, for the gate too"),
    ),
    verified={
        "equation": (
            "tests/layers/attention/test_gated_attention.py::test_equals_plain_loops",
            "tests/layers/attention/test_gated_attention.py::test_preserves_the_function",
        ),
        "reference": (
            "tests/layers/attention/test_gated_attention.py::test_equals_qwen3_next",
            "tests/layers/test_self_attention.py::test_gate_equals_timm",
        ),
    },
    deviations=(
        "Read in the authors' code and in summaries of the paper. Their gate is extra rows of the query projection; "
        "here it is a matrix of its own, with their initialisation N(0, 0.02).",
        "apply starts with W = 0 and gates of 2 sigmoid(X W) = 1, so that the model's function is kept; "
        "preserve=False is the paper's start. The 2 is the same as an output projection of twice the size.",
        "At positions key and query the gate is behind the norm of q and k where there is one: before it, a headwise "
        "gate would have no effect.",
        "The paper's other variants (head-shared, additive, SiLU) did worse there and are left out.",
        "Attention of separate projections (q_proj ... o_proj) is gated by hooks, at position sdpa only, and sees the "
        "input of the query projection as X; nn.MultiheadAttention, which never calls its out_proj, is not gated.",
    ),
    experiments=(
        Experiment(
            "trimtab.studies.attention:backcopy",
            "method=none",
            "method=gated-attention",
            metric="first_token_share",
            mechanism="activation_ratio",
            outcome=(
                "no evidence: the first token's share 0.474 to 0.231, difference -0.243 (95 % interval -1.09 to "
                "+0.605), n=5: at most 0.09 in four gated seeds, 0.95 in the fifth, which did not learn the task; "
                "activation ratio -0.18 (-0.67 to +0.31); the setting was kept after a pilot on one other "
                "seed, which favoured the gate"
            ),
        ),
        Experiment(
            "trimtab.studies.attention:backcopy",
            "method=none,lr=0.01",
            "method=gated-attention,lr=0.01",
            metric="loss",
            mechanism="trigger_loss",
            outcome=(
                "no evidence: loss at three times the tuned rate 3.018 to 2.668, difference -0.350 (95 % interval "
                "-0.769 to +0.069), n=5; loss at triggers 2.45 to 1.70, difference -0.75 (-1.89 to +0.39)"
            ),
        ),
    ),
    apply=_apply,
    remove=_remove,
)
