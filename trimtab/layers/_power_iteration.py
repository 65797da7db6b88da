"""The first singular vectors of a matrix by power iteration, from a fixed start."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from trimtab.scalars import to_scalar

_CONVERGED = 1e-6
_CHECK_EVERY = 20
_MOST_ITERATIONS = 2000


def as_matrix(weight: Tensor) -> Tensor:
    """Return a weight as a matrix, its dimensions after the first taken as one, in float32 or better."""
    return weight.flatten(1).to(torch.promote_types(weight.dtype, torch.float32))


def unit(vector: Tensor) -> Tensor:
    """Return the vector with length 1."""
    return F.normalize(vector, dim=0)


def iterate(matrix: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Return u = Wv / |Wv| and then v = W^T u / |W^T u|: one step towards the first singular vectors."""
    u = unit(matrix.mv(v))
    return u, unit(matrix.mT.mv(u))


def first_singular(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the first singular vectors and value, by power iteration from a fixed start until it has converged."""
    generator = torch.Generator().manual_seed(0)
    v = unit(torch.randn(matrix.shape[1], generator=generator, dtype=torch.float64).to(matrix))
    sigma = matrix.new_zeros(())
    u = matrix.new_zeros(matrix.shape[0])
    for step in range(_MOST_ITERATIONS):
        u, v = iterate(matrix, v)
        if step % _CHECK_EVERY == _CHECK_EVERY - 1:
            previous, sigma = sigma, torch.dot(u, matrix.mv(v))
            # "not above" rather than "below": a zero or non-finite weight gives NaN, and must end the loop as well.
            if not to_scalar((sigma - previous).abs() / sigma) > _CONVERGED:
                break
    return u, v, sigma
