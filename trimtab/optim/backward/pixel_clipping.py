"""Pixel-wise gradient clipping: an identity whose backward bounds the gradient of each pixel, a vector over channels.

Gradients that leave a frozen encoder carry spikes at single pixels. Clipped together with the whole image they would
scale down every other pixel; clipped by value they would change direction. Here each pixel is clipped by itself:

    g_p <- g_p min(1, c / ||g_p||)   for every pixel p, with ||.|| over channels

Pan et al. 2023 (arXiv:2310.12474), PGC; Miao et al. 2024 (arXiv:2405.11252) clip the image-space gradient in the same
way. In the code of both (fudan-zvg/PGC-3D at b86688f, 2d.py; xingy038/Dreamer-XL at b868ce0, train.py) ||.|| is the
largest absolute value.

Shape suffixes: B batch, C channels, any further dimensions are pixels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from trimtab.card import Card, Default, Paper
from trimtab.errors import UsageError, choose

__all__ = ["PixelGradientClip", "clip_pixel_gradients"]

_FOLLOW = ("paper", "code")


class _ClipPixels(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, max_norm: float | Tensor, dim: int, follow: str) -> Tensor:
        ctx.max_norm, ctx.dim, ctx.follow = max_norm, dim, follow
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        # Of g / max |g|, whose squares can neither overflow nor all vanish.
        peak = g.abs().amax(ctx.dim, keepdim=True)
        unit = g / torch.where(peak > 0, peak, torch.ones_like(peak))
        length: Tensor | float = 1.0
        if ctx.follow == "paper":
            length = torch.linalg.vector_norm(unit, dim=ctx.dim, keepdim=True)
        clipped = (unit / length * ctx.max_norm).to(g.dtype)
        return torch.where(peak * length <= ctx.max_norm, g, clipped), None, None, None


def clip_pixel_gradients(x: Tensor, max_norm: float | Tensor = 0.1, *, dim: int = 1, follow: str = "paper") -> Tensor:
    """Return x, and clip the gradient that comes back to it, pixel by pixel.

    g_p <- g_p min(1, max_norm / ||g_p||), with ||.|| over the dimension of the channels.

    A gradient within the bound comes back bit for bit; a pixel whose gradient is not finite stays so.

    Args:
        x: [B, C, ...].
        max_norm: c > 0. Under a loss scaler, multiply it by the scale, as a number or a scalar tensor.
        dim: the dimension of the channels.
        follow: `"paper"`: the Euclidean norm; `"code"`: the largest absolute value, as in the code of both papers.

    Returns:
        x, in its own shape and dtype.

    Raises:
        UsageError: if `max_norm` is not above 0, x has no such dimension, or `follow` is neither.

    Example:
        >>> x = torch.zeros(1, 2, 2, requires_grad=True)  # two pixels of two channels
        >>> clip_pixel_gradients(x, 1.0).backward(torch.tensor([[[3.0, 0.3], [4.0, 0.4]]]))
        >>> x.grad
        tensor([[[0.6000, 0.3000],
                 [0.8000, 0.4000]]])

    References:
        Pan et al. 2023, arXiv:2310.12474; Miao et al. 2024, arXiv:2405.11252.
    """
    _check(max_norm, follow)
    if not -x.dim() <= dim < x.dim():
        raise UsageError(f"dim must be one of the {x.dim()} dimensions of x, got {dim}.")
    return _ClipPixels.apply(x, max_norm, dim, follow)


class PixelGradientClip(nn.Module):
    """`clip_pixel_gradients` as a module, to stand in front of a frozen encoder.

    g_p <- g_p min(1, max_norm / ||g_p||).

    Args:
        max_norm: c > 0.
        dim: the dimension of the channels.
        follow: `"paper"` or `"code"`.

    Raises:
        UsageError: if `max_norm` is not above 0 or `follow` is neither.

    Example:
        >>> encoder = nn.Sequential(PixelGradientClip(0.5), nn.Conv2d(3, 4, 3, stride=2)).requires_grad_(False)
        >>> x = torch.zeros(1, 3, 9, 9, requires_grad=True)
        >>> (1000 * encoder(x)).sum().backward()
        >>> bool(x.grad.norm(dim=1).max() < 0.50001)
        True

    References:
        Pan et al. 2023, arXiv:2310.12474.
    """

    def __init__(self, max_norm: float = 0.1, *, dim: int = 1, follow: str = "paper") -> None:
        super().__init__()
        _check(max_norm, follow)
        self.max_norm, self.dim, self.follow = max_norm, dim, follow

    def forward(self, x: Tensor) -> Tensor:
        """Return x; its gradient will be clipped."""
        return clip_pixel_gradients(x, self.max_norm, dim=self.dim, follow=self.follow)

    def extra_repr(self) -> str:
        """Return the options, for `repr`."""
        return f"max_norm={self.max_norm}, dim={self.dim}, follow={self.follow!r}"


def _check(max_norm: float | Tensor, follow: str) -> None:
    if not isinstance(max_norm, Tensor) and not max_norm > 0:
        raise UsageError(f"max_norm must be above 0, got {max_norm}: the authors use 0.1.")
    choose("follow", follow, _FOLLOW)


CARD = Card(
    name="pixel-clip",
    room="optim",
    summary="bounds the gradient of every pixel by itself and keeps its direction",
    paper=Paper(
        "Enhancing High-Resolution 3D Generation through Pixel-wise Gradient Clipping",
        2023,
        arxiv="2310.12474",
        code="https://github.com/fudan-zvg/PGC-3D",
    ),
    equation="g_p <- g_p min(1, c / ||g_p||) for every pixel p",
    claim="Better high-resolution textures when images are optimised through a frozen encoder, at minimal cost.",
    acts_on="optimizer",
    entry="trimtab.optim.backward.pixel_clipping:clip_pixel_gradients",
    defaults=(
        Default("max_norm", 0.1, "authors' code, 2d.py (grad_clip_rgb)"),
        Default("dim", 1, "ours: channels first; the authors' images have them last"),
        Default("follow", "paper", "the Euclidean norm (recalled; both papers' code takes the largest absolute value)"),
    ),
    verified={
        "equation": (
            "tests/optim/backward/test_pixel_clipping.py::test_equals_plain_loops",
            "tests/optim/backward/test_pixel_clipping.py::test_bit_equal_below_the_bound",
        ),
        "claim": ("tests/optim/backward/test_pixel_clipping.py::test_spikes_do_not_spoil_an_optimised_image",),
    },
    deviations=(
        "The code of both papers bounds the largest absolute value over channels (2d.py, suppress type 0), which lets "
        "through up to sqrt(C) of the Euclidean norm (1.73 for RGB): follow='code'.",
        "The authors multiply the bound by the loss scaler's scale in the hook; here the caller passes the product.",
        "Miao et al. 2024 also clip the gradient of the depth map, as a whole, in proportion to the mean scale of "
        "their Gaussians: not here.",
    ),
)
