"""Logarithms that keep their digits where a probability is close to 0 or to 1."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__: list[str] = []


def log1mexp(x: Tensor) -> Tensor:
    """Return log(1 - exp(x)) for x below 0; x closer to 0 than one rounding step is taken as that step."""
    x = x.clamp(max=-torch.finfo(x.dtype).eps)
    near = x > -math.log(2)
    # Each branch gets an argument of its own side: the gradient of the one not taken would be NaN.
    by_expm1 = torch.log(-torch.expm1(torch.where(near, x, -torch.ones_like(x))))
    by_log1p = torch.log1p(-torch.exp(torch.where(near, -torch.ones_like(x), x)))
    return torch.where(near, by_expm1, by_log1p)
