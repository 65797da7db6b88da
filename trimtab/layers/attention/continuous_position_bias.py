"""Log-spaced continuous position bias: a small network maps relative coordinates in a window to a bias of the logits.

A table of biases has an entry for every offset of one window size; a larger window has offsets that it never saw. A
network of the offsets has a value for all, and on a logarithmic scale a larger window needs it to extrapolate less:

    B(dx, dy) = 16 sigmoid( G(dx^, dy^) ),    dx^ = sign(dx) log2(1 + |8 dx / (w - 1)|) / log2(8)

with w the window's size in training and G two layers with ReLU. Liu et al. 2021 (Swin V2, arXiv:2111.09883).

Shape suffixes: B batch, L positions (height x width of the window), D width, H heads, K width of a head.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.card import Card, Default, Experiment, Paper
from trimtab.errors import UsageError
from trimtab.layers._self_attention import LOOKED_FOR, ConvertedAttention, check_unsharded, converted, convertible
from trimtab.layers.attention.cosine_attention import CosineAttention, check_bias

__all__ = ["LogCPB"]


class LogCPB(nn.Module):
    """Position bias of attention in a 2-D window, B = 16 sigmoid(G(log-spaced relative coordinates)).

    Args:
        window: height and width of the window, in positions.
        heads: H.
        hidden: width of G's hidden layer.
        trained_window: the window that G was or is trained with, by which offsets are divided; by default `window`.
        log_spaced: False gives the paper's linear-spaced variant: offsets times 8 / (w - 1) / log2(8) as they are.
        prefix: tokens in front of the window's positions, such as a class token: their bias is 0.

    Shapes: () -> [H, prefix + L, prefix + L]; rows are queries.

    Raises:
        UsageError: if an argument breaks its rule.

    Example:
        >>> LogCPB((2, 3), heads=4)().shape
        torch.Size([4, 6, 6])

    References:
        Liu et al. 2021, arXiv:2111.09883, section 3.4; authors' code: models/swin_transformer_v2.py.
    """

    coordinates: Tensor
    index: Tensor

    def __init__(
        self,
        window: tuple[int, int],
        heads: int,
        *,
        hidden: int = 512,
        trained_window: tuple[int, int] | None = None,
        log_spaced: bool = True,
        prefix: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if min(heads, hidden) < 1 or prefix < 0:
            raise UsageError(
                f"heads and hidden must be at least 1 and prefix at least 0, got {heads}, {hidden} and {prefix}."
            )
        self.heads, self.log_spaced, self.prefix = heads, log_spaced, prefix
        self.trained_window = _pair("window" if trained_window is None else "trained_window", trained_window or window)
        self.network = nn.Sequential(
            nn.Linear(2, hidden, device=device, dtype=dtype),
            nn.ReLU(),
            nn.Linear(hidden, heads, bias=False, device=device, dtype=dtype),
        )
        self.set_window(window)

    def set_window(self, window: tuple[int, int]) -> None:
        """Give the bias of a window of another size from now on; G and the size it was trained with stay.

        Args:
            window: height and width, in positions.

        Raises:
            UsageError: if it is not two sizes of at least 1.
        """
        self.window = _pair("window", window)
        weight = next(self.network.parameters())
        offsets = [torch.arange(1 - size, size, dtype=torch.float64) for size in self.window]
        # A window of one position has the offset 0 only.
        spaced = [8 * o / max(w - 1, 1) for o, w in zip(offsets, self.trained_window, strict=True)]
        if self.log_spaced:
            spaced = [o.sign() * (1 + o.abs()).log2() for o in spaced]
        table = torch.cartesian_prod(*spaced).view(-1, 2) / math.log2(8)
        positions = torch.cartesian_prod(*(torch.arange(size) for size in self.window)).view(-1, 2)
        difference = positions[:, None] - positions[None] + torch.tensor(self.window) - 1
        index = difference[..., 0] * (2 * self.window[1] - 1) + difference[..., 1]
        self.register_buffer("coordinates", table.to(weight), persistent=False)
        self.register_buffer("index", index.to(weight.device), persistent=False)

    def forward(self) -> Tensor:
        """Return the bias of every pair of positions."""
        table: Tensor = 16 * self.network(self.coordinates).sigmoid()
        bias_HLL = table[self.index].permute(2, 0, 1)
        return F.pad(bias_HLL, (self.prefix, 0, self.prefix, 0)) if self.prefix else bias_HLL

    def extra_repr(self) -> str:
        """Return the window and how it is measured."""
        return f"window={self.window}, trained_window={self.trained_window}, log_spaced={self.log_spaced}"


def _pair(name: str, sizes: tuple[int, int]) -> tuple[int, int]:
    if not isinstance(sizes, (tuple, list)) or len(sizes) != 2 or min(sizes) < 1:
        raise UsageError(f"{name} must be a height and a width of at least 1, got {sizes}.")
    return (int(sizes[0]), int(sizes[1]))


class _BiasedAttention(ConvertedAttention):
    """Dot-product attention with a position bias."""

    parts: ClassVar[tuple[str, ...]] = ("position_bias",)

    def setup(self, **options: Any) -> None:
        self.position_bias = options["position_bias"]

    def attend(self, q_BHLK: Tensor, k_BHLK: Tensor, v_BHLK: Tensor, x_BLD: Tensor) -> Tensor:
        bias_HLL = self.position_bias().to(q_BHLK.dtype)
        check_bias(bias_HLL, q_BHLK.shape[-2])
        return F.scaled_dot_product_attention(q_BHLK, k_BHLK, v_BHLK, attn_mask=bias_HLL)


def _apply(
    model: nn.Module,
    *,
    window: tuple[int, int],
    hidden: int = 512,
    log_spaced: bool = True,
    prefix: int = 0,
) -> dict[str, str]:
    """Add the bias to every attention over a window: cosine attention keeps its core, dot products keep theirs."""
    cosine = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, CosineAttention) and module.position_bias is None
    }
    plain = convertible(model)
    sites = {**cosine, **plain}
    if not sites:
        raise UsageError(f"log-cpb: no attention without one in {type(model).__name__}. Looked for {LOOKED_FOR}.")
    check_unsharded(sites, "log-cpb")
    for name, module in sites.items():
        if getattr(module, "causal", False):
            raise UsageError(f"log-cpb: {name!r} is causal: a window's positions have no order to hide.")
    options = {"hidden": hidden, "log_spaced": log_spaced, "prefix": prefix}
    biases = {
        name: LogCPB(window, int(module.num_heads), **_place(module), **options)  # type: ignore[arg-type]
        for name, module in sites.items()
    }
    for name, module in cosine.items():
        module.position_bias = biases[name]
    for name, module in plain.items():
        _BiasedAttention.convert(module, position_bias=biases[name])
    height, width = _pair("window", window)
    return dict.fromkeys(sites, f"position bias over a window of {height} x {width}")


def _place(module: nn.Module) -> dict[str, Any]:
    weight = next(module.parameters())
    return {"device": weight.device, "dtype": weight.dtype}


def _remove(model: nn.Module) -> dict[str, str]:
    """Take the position bias out again."""
    plain = converted(model, _BiasedAttention)
    for module in plain.values():
        module.revert()
    cosine = {name: part for name, part in model.named_modules() if isinstance(part, CosineAttention)}
    found = {name: part for name, part in cosine.items() if isinstance(part.position_bias, LogCPB)}
    for part in found.values():
        part.position_bias = None
    return dict.fromkeys([*plain, *found], "no position bias")


CARD = Card(
    name="log-cpb",
    room="layers",
    summary="attention's position bias from a network of log-spaced offsets, which carries over to larger windows",
    paper=Paper(
        "Swin Transformer V2: Scaling Up Capacity and Resolution",
        2021,
        arxiv="2111.09883",
        code="https://github.com/microsoft/Swin-Transformer",
    ),
    equation="B = 16 sigmoid( G( sign(d) log2(1 + |8 d / (w - 1)|) / log2(8) ) )",
    claim=(
        "Models trained with a window of 8 x 8 keep their accuracy in windows of 12 to 24 without fine-tuning, where a "
        "table of biases that is interpolated loses much of it and linear spacing some; gains grow with the window."
    ),
    acts_on="model",
    entry="trimtab.layers.attention.continuous_position_bias:LogCPB",
    defaults=(
        Default("hidden", 512, "authors' code: cpb_mlp"),
        Default("log_spaced", True, "paper, section 3.4"),
        Default("prefix", 0, "ours: Swin has no class token"),
    ),
    verified={
        "equation": (
            "tests/layers/attention/test_continuous_position_bias.py::test_equals_plain_loops",
            "tests/layers/attention/test_continuous_position_bias.py::test_another_window_shares_the_offsets_it_knows",
        ),
        "reference": (
            "tests/layers/attention/test_swin_v2_reference.py::test_window_attention_equals_timm",
            "tests/layers/attention/test_swin_v2_reference.py::test_vit_becomes_a_swin_v2",
        ),
    },
    deviations=(
        "The paper's equation is sign(d) log(1 + |d|) of offsets as they are; the authors' code divides by the window "
        "first, to +-8, takes log2 and divides by log2(8), and squashes G by 16 sigmoid, which the paper does not "
        "mention. This follows the code.",
        "The linear-spaced variant has no public code: its coordinates are those before the logarithm, over log2(8).",
    ),
    experiments=(
        Experiment(
            "trimtab.studies.window_transfer:window_transfer",
            "bias=table,lr=0.003",
            "bias=log,lr=0.003",
            metric="transfer_accuracy",
            higher_is_better=True,
            mechanism="accuracy",
            outcome=(
                "better: accuracy in the larger window 0.194 to 0.403, difference +0.209 (95 % interval +0.080 to "
                "+0.338), n=5; in the trained window 0.666 to 0.832: part of it is that the network learns faster "
                "than the table; with each at its best of four learning rates on two other seeds (0.03 and "
                "0.01), 0.259 to 0.440, difference +0.181 (+0.144 to +0.217)"
            ),
        ),
    ),
    apply=_apply,
    remove=_remove,
)
