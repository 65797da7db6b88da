"""The subspaces of gradients: equal to the singular value decomposition's, however the gradient is scaled."""

from __future__ import annotations

import pytest
import torch

from trimtab.optim.projected import _projection
from trimtab.optim.projected._projection import random_subspace, top_subspace


def _matrix(m, n, dtype, *, scale=1.0, decay=0.9):
    generator = torch.Generator().manual_seed(0)
    u = torch.linalg.qr(torch.randn(m, m, generator=generator, dtype=torch.float64)).Q
    v = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64)).Q
    s = decay ** torch.arange(min(m, n), dtype=torch.float64)
    return (scale * (u[:, : len(s)] * s) @ v[:, : len(s)].T).to(dtype)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("shape", [(30, 12), (12, 30), (16, 16), (1, 9), (9, 1)])
@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-4), (torch.float64, 1e-11)], ids=str)
def test_equals_the_singular_vectors(shape, side, scale, dtype, bound):
    g = _matrix(*shape, dtype, scale=scale)
    rank = max(1, min(shape) // 3)
    u, _, vh = torch.linalg.svd((g.double() / scale), full_matrices=False)
    exact = u[:, :rank] if side == "left" else vh[:rank].T
    found = top_subspace(g, rank, side).double()
    assert float((found - exact * torch.sign((found * exact).sum(0))).abs().max()) < bound
    largest = found.gather(0, found.abs().argmax(0, keepdim=True))
    assert bool((largest > 0).all())


def test_weak_directions_are_decomposed(monkeypatch):
    # The sixth of these singular values is 1e-5 of the first: its square is below float32's rounding of the first's.
    g = _matrix(30, 12, torch.float32, decay=0.1)
    assert _projection._by_eigh(g, 6, "right") is None
    assert _projection._by_eigh(g, 2, "right") is not None
    _u, _, vh = torch.linalg.svd(g.double(), full_matrices=False)
    found = top_subspace(g, 6, "right").double()
    assert float((found - vh[:6].T @ (vh[:6] @ found)).norm()) < 0.02


@pytest.mark.parametrize("g", [torch.zeros(6, 4), torch.ones(6, 4), torch.eye(6)[:, :4]], ids=["zeros", "ones", "eye"])
def test_degenerate_gradients_have_an_orthonormal_basis(g):
    for side in ("left", "right"):
        basis = top_subspace(g, 3, side)
        torch.testing.assert_close(basis.T @ basis, torch.eye(3), atol=1e-5, rtol=0)


def test_a_failed_solver_is_replaced(monkeypatch):
    g = _matrix(9, 7, torch.float64)
    expected = top_subspace(g, 3, "right")

    def fails(matrix):
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(torch.linalg, "eigh", fails)
    torch.testing.assert_close(top_subspace(g, 3, "right"), expected)


def test_random_bases_are_orthonormal_and_repeatable():
    one, two = (random_subspace(torch.empty(0), 9, 4, torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(one, two)
    torch.testing.assert_close(one.T @ one, torch.eye(4))
