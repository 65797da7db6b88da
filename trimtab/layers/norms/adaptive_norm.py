"""AdaLN-SOLA: one adaptive modulation shared by all layers, with a low-rank adjustment in each.

A diffusion transformer scales, shifts and gates every block by functions of its condition c (time, class). AdaLN-Zero
has a matrix of D x 6D in each block, a third of the model's parameters; AdaLN-single shares one between all, and leaves
each block a bias of its own. AdaLN-SOLA shares one too, and adds to it a low-rank function of c:

    m_l = W s(c) + b  +  alpha / r * B_l A_l s(c)  +  t_l,    (shift, scale, gate) x 2 = m_l

with s = SiLU, A_l of D x 6r, B_l of 6r x 6D that starts at 0 as W, b and t_l do. A block then is

    x + (1 - gate_1) * attention( (1 + scale_1) N(x) + shift_1 ),    the same with the MLP

Hai et al. 2024 (EzAudio, arXiv:2409.10819).

Shape suffixes: B batch, L length, D width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.card import Card, Default, Experiment, Paper
from trimtab.errors import UsageError, choose

__all__ = ["AdaptiveBlock", "AdaptiveModulation", "SharedModulation"]

_PARTS = 6
_KINDS = ("full", "single", "sola")


class SharedModulation(nn.Module):
    """The modulation that all layers share, W s(c) + b, zero at initialisation: computed once a forward.

    Args:
        width: D, at least 1.
        device: of the parameters.
        dtype: of the parameters.

    Shapes: condition [B, D] -> [B, 6, D].

    Raises:
        UsageError: if the width is below 1.

    Example:
        >>> SharedModulation(4)(torch.ones(2, 4)).shape
        torch.Size([2, 6, 4])

    References:
        Hai et al. 2024, arXiv:2409.10819; authors' code: `time_ada` of src/models/udit.py.
    """

    def __init__(
        self, width: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.linear = _zero_linear(_checked(width), device, dtype)

    def forward(self, condition_BD: Tensor) -> Tensor:
        """Return the shared modulation."""
        return self.linear(F.silu(condition_BD)).unflatten(-1, (_PARTS, -1))


class AdaptiveModulation(nn.Module):
    """A layer's modulation: of its own (`"full"`), shared (`"single"`) or shared with low rank (`"sola"`).

    Args:
        width: D, at least 1.
        kind: `"sola"`, or what it is compared with: `"full"` is AdaLN-Zero's, `"single"` is AdaLN-single's.
        rank: r, for each of the six parts, at least 1; for `"sola"` only.
        alpha: the low-rank part is multiplied by alpha / r; by default r.
        bias: whether the layer has a bias t of its own, for `"sola"`; `"single"` always has one, `"full"` has its
            matrix's.
        device: of the parameters.
        dtype: of the parameters.

    Shapes: condition [B, D], shared [B, 6, D] -> [B, 6, D]; the six parts are shift, scale and gate of the attention,
    then of the MLP.

    Raises:
        UsageError: if an argument breaks its rule.

    Example:
        >>> shared, layer = SharedModulation(4), AdaptiveModulation(4, rank=1)
        >>> c = torch.ones(2, 4)
        >>> bool((layer(c, shared(c)) == shared(c)).all())  # the low-rank part starts at 0
        True

    References:
        Hai et al. 2024, arXiv:2409.10819; authors' code: `AdaLN` of src/models/blocks.py. AdaLN-single: Chen et al.
        2023 (PixArt-alpha), arXiv:2310.00426. AdaLN-Zero: Peebles and Xie 2022 (DiT), arXiv:2212.09748.
    """

    def __init__(
        self,
        width: int,
        kind: str = "sola",
        *,
        rank: int = 36,
        alpha: float | None = None,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        choose("kind of modulation", kind, _KINDS)
        if rank < 1:
            raise UsageError(f"rank must be at least 1, got {rank}: kind='single' has no low-rank part.")
        alpha = float(rank) if alpha is None else alpha
        if not math.isfinite(alpha):
            raise UsageError(f"alpha must be finite, got {alpha}: the rank is the default.")
        self.kind, self.scaling = kind, alpha / rank
        self.own = _zero_linear(_checked(width), device, dtype) if kind == "full" else None
        self.down = self.up = self.table = None
        if kind == "sola":
            self.down = nn.Linear(width, _PARTS * rank, bias=False, device=device, dtype=dtype)
            self.up = nn.Linear(_PARTS * rank, _PARTS * width, bias=False, device=device, dtype=dtype)
            nn.init.zeros_(self.up.weight)
        if kind == "single" or (kind == "sola" and bias):
            self.table = nn.Parameter(torch.zeros(_PARTS, width, device=device, dtype=dtype))

    def forward(self, condition_BD: Tensor, shared_B6D: Tensor | None = None) -> Tensor:
        """Return the layer's modulation.

        Raises:
            UsageError: if a kind that shares is not given what is shared.
        """
        if self.own is not None:
            return self.own(F.silu(condition_BD)).unflatten(-1, (_PARTS, -1))
        if shared_B6D is None:
            raise UsageError(f"modulation of kind {self.kind!r} needs the output of SharedModulation, got None.")
        found = shared_B6D
        if self.down is not None and self.up is not None:
            low = self.up(self.down(F.silu(condition_BD))) * self.scaling
            found = found + low.unflatten(-1, (_PARTS, -1))
        return found if self.table is None else found + self.table

    def extra_repr(self) -> str:
        """Return the kind and the factor of the low-rank part."""
        return f"kind={self.kind!r}, scaling={self.scaling:g}"


class AdaptiveBlock(nn.Module):
    """A transformer block whose norms are scaled, shifted and gated by a modulation.

    Args:
        width: D, at least 1.
        attention: maps [B, L, D] to [B, L, D].
        mlp: maps [B, L, D] to [B, L, D].
        modulation: of this layer.
        open_gates: True multiplies branches by 1 - gate, so that a modulation of 0 leaves a plain pre-norm block, as
            the authors' code does; False by gate, so that it leaves the identity, as in DiT and PixArt.
        norm: makes a norm of a width.

    Shapes: [B, L, D], condition [B, D], shared [B, 6, D] -> [B, L, D].

    Raises:
        UsageError: if the width is below 1.

    Example:
        >>> block = AdaptiveBlock(4, nn.Identity(), nn.Identity(), AdaptiveModulation(4, "full"), open_gates=False)
        >>> x = torch.ones(1, 2, 4)
        >>> bool((block(x, torch.ones(1, 4)) == x).all())
        True

    References:
        Hai et al. 2024, arXiv:2409.10819; authors' code: `DiTBlock` of src/models/blocks.py.
    """

    def __init__(
        self,
        width: int,
        attention: nn.Module,
        mlp: nn.Module,
        modulation: AdaptiveModulation,
        *,
        open_gates: bool = True,
        norm: Callable[[int], nn.Module] = nn.LayerNorm,
    ) -> None:
        super().__init__()
        _checked(width)
        self.norm1, self.attention = norm(width), attention
        self.norm2, self.mlp = norm(width), mlp
        self.modulation, self.open_gates = modulation, open_gates

    def forward(self, x_BLD: Tensor, condition_BD: Tensor, shared_B6D: Tensor | None = None) -> Tensor:
        """Return the block's output."""
        parts = self.modulation(condition_BD, shared_B6D).unsqueeze(2).unbind(1)
        for norm, sublayer, (shift, scale, gate) in (
            (self.norm1, self.attention, parts[:3]),
            (self.norm2, self.mlp, parts[3:]),
        ):
            branch = sublayer((1 + scale) * norm(x_BLD) + shift)
            x_BLD = x_BLD + (1 - gate if self.open_gates else gate) * branch
        return x_BLD


def _zero_linear(width: int, device: Any, dtype: torch.dtype | None) -> nn.Linear:
    linear = nn.Linear(width, _PARTS * width, device=device, dtype=dtype)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


def _checked(width: int) -> int:
    if width < 1:
        raise UsageError(f"width must be at least 1, got {width}: give the width of the residual stream.")
    return width


CARD = Card(
    name="adaln-sola",
    room="layers",
    summary="one adaptive LayerNorm modulation for all layers of a diffusion transformer, with a low-rank part in each",
    paper=Paper(
        "EzAudio: Enhancing Text-to-Audio Generation with Efficient Diffusion Transformer",
        2024,
        arxiv="2409.10819",
        code="https://github.com/haidog-yaqub/EzAudio",
    ),
    equation="m_l = W s(c) + b + alpha / r * B_l A_l s(c) + t_l",
    claim=(
        "Far fewer parameters than AdaLN in every block at the same quality, without the instability of one that is "
        "shared by all (AdaLN-single)."
    ),
    acts_on="model",
    entry="trimtab.layers.norms.adaptive_norm:AdaptiveModulation",
    defaults=(
        Default("kind", "sola", "the method; the others are what it is compared with"),
        Default("rank", 36, "authors' configuration: ada_sola_rank of EzAudio-XL, of width 1152"),
        Default("alpha", None, "authors' configuration: ada_sola_alpha equals the rank"),
        Default("bias", True, "authors' configuration: time_fusion is ada_sola_bias"),
    ),
    verified={
        "equation": (
            "tests/layers/norms/test_adaptive_norm.py::test_equals_plain_loops",
            "tests/layers/norms/test_adaptive_norm.py::test_sola_starts_as_single",
            "tests/layers/norms/test_adaptive_norm.py::test_high_rank_reaches_any_full_modulation",
        ),
    },
    deviations=(
        "The paper's text was not at hand: equations, initialisation and defaults are those of the authors' code.",
        "The authors' code takes SiLU of the condition once, outside; here each part takes it, so that a condition is "
        "one thing throughout.",
        "The authors' code spells the kind without bias 'ada_solo' in one place and 'ada_sola' in the others, so that "
        "it cannot be built; here it is bias=False.",
        "The authors' gate is 1 - gate, DiT's and PixArt's is gate: open_gates chooses.",
    ),
    experiments=(
        Experiment(
            "trimtab.studies.adaptive_norm:denoising",
            "kind=full,lr=0.01",
            "kind=sola,lr=0.01",
            mechanism="modulation_parameters",
            outcome=(
                "no evidence of a difference: loss 0.4788 to 0.4770, difference -0.0018 (95 % interval -0.0104 to "
                "+0.0069), n=5, with 31,392 parameters of modulation for 56,448"
            ),
        ),
        Experiment(
            "trimtab.studies.adaptive_norm:denoising",
            "kind=single,lr=0.01",
            "kind=sola,lr=0.01",
            mechanism="spike",
            outcome=(
                "no evidence: loss 0.4815 to 0.4770, difference -0.0045 (95 % interval -0.0117 to +0.0027), n=5; "
                "largest over median gradient norm 2.04 to 2.19: AdaLN-single is not unstable at this size"
            ),
        ),
    ),
)
