"""Scaled cosine attention: logits are the cosine of query and key over a learned temperature.

Dot products grow with the norms of queries and keys, and in large models some heads come to be ruled by a few pairs of
positions. With cosines the logits, before a position bias, stay within 1 / tau however the weights grow:

    A = softmax( cos(q, k) / tau + B ) v,    1 / tau = exp(min(s, log 100)),    tau >= 0.01

with one learned s in each head. Liu et al. 2021 (Swin V2, arXiv:2111.09883).

Shape suffixes: B batch, L length, D width, H heads, K width of a head.
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

__all__ = ["CosineAttention", "scaled_cosine_attention"]

_EPS = 1e-6
"""Ours: 1e-12, as torch has it, makes gradients of 1e12 where queries start at 0."""


def scaled_cosine_attention(
    q_BHLK: Tensor,
    k_BHLK: Tensor,
    v_BHLK: Tensor,
    logit_scale_H: Tensor,
    *,
    max_scale: float = 100.0,
    bias: Tensor | None = None,
    causal: bool = False,
) -> Tensor:
    """Attend by cosines: softmax( cos(q, k) * exp(min(s, log max_scale)) + bias ) v.

    Cosines are taken in float32 or better, and a query or key of zeros has cosine 0 with everything.

    Args:
        q_BHLK: queries.
        k_BHLK: keys.
        v_BHLK: values.
        logit_scale_H: s, logarithm of the inverse temperature of each head.
        max_scale: largest inverse temperature 1 / tau, above 0.
        bias: added to the logits, of a shape that broadcasts to [B, H, L, L]: position bias, mask of 0 and -inf, or
            their sum.
        causal: whether a position sees only itself and what is before it.

    Returns:
        The heads' outputs, [B, H, L, K], in the dtype of the values.

    Raises:
        UsageError: if `max_scale` is not above 0, or the bias is of booleans or of another
            length.

    Example:
        >>> q = torch.tensor([[[[3.0, 0.0], [0.0, 5.0]]]])
        >>> y = scaled_cosine_attention(q, q, torch.eye(2).view(1, 1, 2, 2), torch.tensor([math.log(2.0)]))
        >>> [round(p, 3) for p in y[0, 0, 0].tolist()]  # softmax of (2, 0)
        [0.881, 0.119]

    References:
        Liu et al. 2021, arXiv:2111.09883, section 3.3.
    """
    if not 0 < max_scale < math.inf:
        raise UsageError(f"max_scale must be above 0 and finite, got {max_scale}: 100 is the default.")
    if bias is not None and not bias.is_floating_point():
        raise UsageError(f"bias is added to the logits, got {bias.dtype}: make a mask 0 where it is seen, else -inf.")
    if bias is not None:
        check_bias(bias, q_BHLK.shape[-2])
    scale = logit_scale_H.to(torch.promote_types(logit_scale_H.dtype, torch.float32)).clamp(max=math.log(max_scale))
    q_BHLK, k_BHLK = (_unit(x) for x in (q_BHLK, k_BHLK))
    q_BHLK = (q_BHLK * scale.exp().view(-1, 1, 1)).to(v_BHLK.dtype)
    if causal and bias is not None:
        length = q_BHLK.shape[-2]
        bias = bias.masked_fill(torch.ones(length, length, dtype=torch.bool, device=bias.device).triu(1), -math.inf)
    bias = None if bias is None else bias.to(v_BHLK.dtype)
    return F.scaled_dot_product_attention(
        q_BHLK, k_BHLK.to(v_BHLK.dtype), v_BHLK, attn_mask=bias, is_causal=causal and bias is None, scale=1.0
    )


def check_bias(bias: Tensor, length: int) -> None:
    """Raise a UsageError if a bias is not for logits of that many positions."""
    if not set(bias.shape[-2:]) <= {1, length}:
        raise UsageError(f"a bias of {tuple(bias.shape[-2:])} does not fit {length} positions: give it their window.")


def _unit(x: Tensor) -> Tensor:
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1, eps=_EPS)


class CosineAttention(ConvertedAttention):
    """Self-attention whose logits are cosines of queries and keys over a learned temperature in each head.

    Args:
        width: D, a multiple of `heads`.
        heads: H.
        causal: whether a position sees only itself and what is before it.
        bias: whether the projections have biases.
        scale: 1 / tau at initialisation, above 0.
        max_scale: largest 1 / tau, at least `scale`.
        position_bias: a module that returns a bias of the logits, [H, L, L], without arguments: `LogCPB`.

    Shapes: [B, L, D] -> [B, L, D].

    Attributes:
        logit_scale: logarithm of 1 / tau of each head, [H].

    Raises:
        UsageError: if an argument breaks its rule.

    Example:
        >>> layer = CosineAttention(8, 2, causal=True)
        >>> layer(torch.randn(1, 3, 8, generator=torch.Generator().manual_seed(0))).shape
        torch.Size([1, 3, 8])

    References:
        Liu et al. 2021, arXiv:2111.09883, section 3.3; authors' code: models/swin_transformer_v2.py.
    """

    position_bias: nn.Module | None
    parts: ClassVar[tuple[str, ...]] = ("logit_scale", "position_bias", "max_scale")

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        causal: bool = False,
        bias: bool = True,
        scale: float = 10.0,
        max_scale: float = 100.0,
        position_bias: nn.Module | None = None,
    ) -> None:
        super().__init__(width, heads, causal=causal, bias=bias)
        self.setup(scale=scale, max_scale=max_scale, position_bias=position_bias)

    def setup(self, **options: Any) -> None:
        """Check the options and add the temperature; see the class.

        Raises:
            UsageError: if the scales are not above 0 and in order.
        """
        scale, max_scale = options["scale"], options["max_scale"]
        if not 0 < scale <= max_scale < math.inf:
            raise UsageError(
                f"scales must satisfy 0 < scale <= max_scale, got {scale} and {max_scale}: 10 and 100 are the defaults."
            )
        like = self.qkv.weight
        self.max_scale = max_scale
        self.logit_scale = nn.Parameter(like.new_full((self.num_heads,), math.log(scale)))
        self.position_bias = options.get("position_bias")

    def attend(self, q_BHLK: Tensor, k_BHLK: Tensor, v_BHLK: Tensor, x_BLD: Tensor) -> Tensor:
        """Return the heads' outputs, [B, H, L, K]."""
        bias = None if self.position_bias is None else self.position_bias()
        return scaled_cosine_attention(
            q_BHLK, k_BHLK, v_BHLK, self.logit_scale, max_scale=self.max_scale, bias=bias, causal=self.causal
        )


def _apply(model: nn.Module, *, scale: float = 10.0, max_scale: float = 100.0) -> dict[str, str]:
    """Turn every fused self-attention that is recognised into cosine attention; options as `CosineAttention`'s."""
    sites = attentions(model, "cosine-attention")
    for module in sites.values():
        CosineAttention.convert(module, scale=scale, max_scale=max_scale)
    return dict.fromkeys(sites, f"logits = cos(q, k) * s, s = {scale:g} learned, at most {max_scale:g}")


def _remove(model: nn.Module) -> dict[str, str]:
    """Turn the attention back into what it was: dot products over sqrt(K)."""
    return revert_all(model, CosineAttention, "logits = q·k / sqrt(K) again")


CARD = Card(
    name="cosine-attention",
    room="layers",
    summary="attention logits as cosines over a learned temperature, so that they cannot grow with the weights",
    paper=Paper(
        "Swin Transformer V2: Scaling Up Capacity and Resolution",
        2021,
        arxiv="2111.09883",
        code="https://github.com/microsoft/Swin-Transformer",
    ),
    equation="A = softmax( cos(q, k) / tau + B ) v, tau >= 0.01 learned in each head",
    claim=(
        "Milder attention values than dot products in large vision models, where a few pairs of positions rule the "
        "maps of some heads; with residual post-norm, models of up to 3B parameters train stably."
    ),
    acts_on="model",
    entry="trimtab.layers.attention.cosine_attention:CosineAttention",
    treats={"attention-logit-growth": 4, "attention-entropy-collapse": 4},
    defaults=(
        Default("scale", 10.0, "authors' code: logit_scale starts at log(10)"),
        Default("max_scale", 100.0, "paper, section 3.3: tau is above 0.01; authors' code clamps at log(1 / 0.01)"),
        Default("bias", True, "authors' code: qkv_bias=True"),
    ),
    verified={
        "equation": (
            "tests/layers/attention/test_cosine_attention.py::test_equals_plain_loops",
            "tests/layers/attention/test_cosine_attention.py::test_logits_are_bounded",
        ),
        "reference": (
            "tests/layers/attention/test_swin_v2_reference.py::test_window_attention_equals_timm",
            "tests/layers/attention/test_swin_v2_reference.py::test_shifted_windows_equal_timm",
        ),
    },
    deviations=(
        "A norm below 1e-6 counts as 1e-6, where the authors' code has torch's 1e-12: gradients stay moderate where "
        "queries start at 0.",
        "The authors' projection has biases for queries and values only; a fused bias has one for keys too, as the "
        "model that is changed does.",
        "Cosines are taken in float32 under bfloat16 and autocast; the authors' code takes them in the dtype of q.",
        "Applied to a trained model it changes the function: it needs training again.",
    ),
    experiments=(
        Experiment(
            "lm-small",
            "lr=0.1,steps=300",
            "lr=0.1,steps=300,with=cosine-attention",
            mechanism="attention_max_logit",
            outcome=(
                "better: final loss 2.631 to 2.399, difference -0.232 (95 % interval -0.304 to -0.160), n=5; largest "
                "attention logit 1,970 to 10.5, lowest attention entropy 0.016 to 1.08"
            ),
        ),
    ),
    apply=_apply,
    remove=_remove,
)
