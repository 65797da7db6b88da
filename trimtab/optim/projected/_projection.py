"""The subspace that a gradient is projected on: its first singular vectors, or random orthonormal directions.

The r first right singular vectors of G are the eigenvectors of G^T G with the r largest eigenvalues, which are cheaper
to compute than a singular value decomposition. Squaring halves the digits: where an eigenvalue that counts is lost in
the largest one's rounding error, or the eigenvalue solver fails, the decomposition of G itself is taken.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from trimtab.scalars import to_scalar


def top_subspace(g: Tensor, rank: int, side: str, *, svd: bool = False) -> Tensor:
    """Return an orthonormal basis of the `rank` strongest directions of a matrix, strongest first.

    Args:
        g: [m, n], float32 or float64, finite.
        rank: number of directions, at most min(m, n).
        side: "left" for directions in the space of columns, "right" for those in the space of rows.
        svd: take `torch.linalg.svd` in float32 with the signs that it gives, as GaLore's authors do.

    Returns:
        [m, rank] or [n, rank]. Unless `svd`, each vector's largest entry in magnitude is positive.

    Example:
        >>> top_subspace(torch.tensor([[0.0, 2.0], [1.0, 0.0], [0.0, 0.0]]), 1, "right")
        tensor([[0.],
                [1.]])
    """
    if svd:
        return _by_svd(g.float(), rank, side).to(g.dtype)
    basis = _by_eigh(g, rank, side)
    return _canonical(_by_svd(g, rank, side) if basis is None else basis)


def random_subspace(like: Tensor, dim: int, rank: int, generator: torch.Generator) -> Tensor:
    """Return a uniformly random orthonormal basis, [dim, rank], drawn on the CPU."""
    gaussian = torch.randn(dim, rank, generator=generator, dtype=torch.float64)
    q, r = torch.linalg.qr(gaussian)
    # Without the signs of r's diagonal, q would not be uniformly distributed.
    return (q * torch.sign(r.diagonal())).to(dtype=like.dtype, device=like.device)


def _by_eigh(g: Tensor, rank: int, side: str) -> Tensor | None:
    """Return the basis by way of the smaller Gram matrix, or None where that is not accurate."""
    m, n = g.shape
    gram = g @ g.mT if m <= n else g.mT @ g
    try:
        values, vectors = torch.linalg.eigh(gram)
    except torch.linalg.LinAlgError:
        return None
    # A direction's relative error is about that of rounding over its eigenvalue's part of the largest. Squares of huge
    # entries overflow, and those of tiny ones vanish.
    low, high = to_scalar(values[-rank]), to_scalar(values[-1])
    limits = torch.finfo(g.dtype)
    if not (16 * min(m, n) * max(limits.eps * high, limits.tiny / limits.eps) < low and high < math.inf):
        return None
    basis = vectors[:, -rank:].flip(1)
    if (side == "left") == (m <= n):
        return basis
    # The other side's vectors are G v / |G v|; made orthonormal again, as small ones carry larger errors.
    q, r = torch.linalg.qr(g.mT @ basis if m <= n else g @ basis)
    return q * torch.sign(r.diagonal())


def _by_svd(g: Tensor, rank: int, side: str) -> Tensor:
    u, _, vh = torch.linalg.svd(g, full_matrices=False)
    return u[:, :rank].clone() if side == "left" else vh[:rank].mT.clone()


def _canonical(basis: Tensor) -> Tensor:
    """Turn every vector so that its entry of largest magnitude is positive: solvers choose signs as they like."""
    largest = basis.gather(0, basis.abs().argmax(0, keepdim=True))
    return torch.where(largest < 0, -basis, basis)
