"""Multiple negatives ranking against loops in NumPy, the closed-form gradient and a single process."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from trimtab.errors import UsageError
from trimtab.losses import multiple_negatives_ranking_loss
from trimtab.testing import run_ranks


def _pairs(size=6, width=4, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, width, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2)]


def _numpy_values(anchors, candidates, scale, cosine):
    """-log( exp(c S(a_i, p_i)) / sum_j exp(c S(a_i, p_j)) ), anchor by anchor."""
    values = []
    for i, a in enumerate(anchors):
        scores = []
        for p in candidates:
            norm = np.sqrt((a * a).sum() * (p * p).sum()) if cosine else 1
            scores.append(scale * (a * p).sum() / norm)
        values.append(np.log(np.exp(scores).sum()) - scores[i])
    return np.array(values)


@pytest.mark.parametrize(("similarity", "scale", "used"), [("dot", None, 1), ("cosine", None, 20), ("cosine", 3.0, 3)])
@pytest.mark.parametrize("further", [0, 3])
@pytest.mark.parametrize("symmetric", [False, True])
def test_equals_numpy(similarity, scale, used, further, symmetric):
    anchors, positives = _pairs()
    negatives = _pairs(further, seed=9)[0] if further else None
    options = {"similarity": similarity, "scale": scale, "symmetric": symmetric}
    found = multiple_negatives_ranking_loss(anchors, positives, negatives, reduction="none", **options)
    candidates = positives.numpy() if negatives is None else np.concatenate([positives.numpy(), negatives.numpy()])
    expected = _numpy_values(anchors.numpy(), candidates, used, similarity == "cosine")
    if symmetric:
        back = _numpy_values(positives.numpy(), anchors.numpy(), used, similarity == "cosine")
        expected = (expected + back) / 2
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-10)
    mean = multiple_negatives_ranking_loss(anchors, positives, negatives, **options)
    assert mean.item() == pytest.approx(expected.mean())


def test_is_the_cross_entropy_of_scores_with_diagonal_labels():
    anchors, positives = _pairs()
    expected = F.cross_entropy(anchors @ positives.T, torch.arange(6))
    torch.testing.assert_close(multiple_negatives_ranking_loss(anchors, positives), expected)


@pytest.mark.parametrize("symmetric", [False, True])
def test_gradient_is_the_matrix_form(symmetric):
    """dL/dS = c (softmax(c S) - I) / B, and both directions averaged; chained by hand into both sides."""
    anchors, positives = (x.requires_grad_() for x in _pairs())
    multiple_negatives_ranking_loss(anchors, positives, scale=0.7, symmetric=symmetric).backward()
    a, p = anchors.detach().numpy(), positives.detach().numpy()

    def direction(x, y):
        scores = 0.7 * x @ y.T
        soft = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
        return 0.7 * (soft - np.eye(6)) / 6

    matrix = (direction(a, p) + direction(p, a).T) / 2 if symmetric else direction(a, p)
    np.testing.assert_allclose(anchors.grad.numpy(), matrix @ p, rtol=1e-10, atol=1e-14)
    np.testing.assert_allclose(positives.grad.numpy(), matrix.T @ a, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("similarity", ["dot", "cosine"])
def test_gradcheck(similarity):
    anchors, positives = (x.requires_grad_() for x in _pairs(4, 3))
    negatives = _pairs(2, 3, seed=5)[0].requires_grad_()
    for reduction in ("mean", "none"):
        assert torch.autograd.gradcheck(
            lambda *x, r=reduction: multiple_negatives_ranking_loss(
                *x, similarity=similarity, scale=2.0, symmetric=True, reduction=r
            ),
            (anchors, positives, negatives),
        )


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("hard", [False, True])
def test_ranks_equal_the_single_process(symmetric, hard):
    anchors, positives = _pairs(7, 4)
    negatives = _pairs(5, 4, seed=5)[0] if hard else None
    weight = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def step(a, p, n, **options):
        w = weight.clone().requires_grad_()
        further = None if n is None else n @ w
        loss = multiple_negatives_ranking_loss(a @ w, p @ w, further, symmetric=symmetric, **options)
        loss.backward()
        return loss.detach(), w.grad

    def work(rank):
        mine = slice(0, 2) if rank == 0 else slice(2, None)
        loss, gradient = step(
            anchors[mine], positives[mine], None if negatives is None else negatives[mine], all_ranks=True
        )
        torch.distributed.all_reduce(gradient)
        return loss, gradient / 2

    whole, expected = step(anchors, positives, negatives)
    for loss, gradient in run_ranks(work):
        torch.testing.assert_close(loss, whole, rtol=1e-12, atol=0)
        torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-13)


def test_reductions_agree():
    anchors, positives = _pairs()
    each = multiple_negatives_ranking_loss(anchors, positives, reduction="none")
    assert each.shape == (6,)
    torch.testing.assert_close(multiple_negatives_ranking_loss(anchors, positives, reduction="sum"), each.sum())
    for denominator in (2.5, torch.tensor(2.5)):
        found = multiple_negatives_ranking_loss(anchors, positives, denominator=denominator)
        torch.testing.assert_close(found, each.sum() / 2.5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("similarity", ["dot", "cosine"])
def test_computed_in_float32_or_better(dtype, similarity):
    anchors, positives = (x.requires_grad_() for x in _pairs(dtype=dtype))
    loss = multiple_negatives_ranking_loss(anchors, positives, similarity=similarity)
    exact = multiple_negatives_ranking_loss(
        anchors.detach().double(), positives.detach().double(), similarity=similarity
    )
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-5)
    loss.backward()
    assert anchors.grad.dtype == positives.grad.dtype == dtype
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(multiple_negatives_ranking_loss(anchors, positives, similarity=similarity), loss)


def test_edge_batches():
    empty = torch.zeros(0, 3, requires_grad=True)
    loss = multiple_negatives_ranking_loss(empty, empty, symmetric=True)
    loss.backward()
    assert loss.item() == 0
    single = torch.ones(1, 3)
    assert multiple_negatives_ranking_loss(single, single).item() == 0, "no negatives, nothing to rank"
    large = (1e4 * torch.eye(3)).requires_grad_()
    multiple_negatives_ranking_loss(large, large.flip(0)).backward()
    assert large.grad.isfinite().all()
    zeros = torch.zeros(3, 3, requires_grad=True)
    multiple_negatives_ranking_loss(zeros, torch.eye(3), similarity="cosine").backward()
    assert zeros.grad.abs().max() < 20, "the gradient of an embedding of zeros is blown up"
    diverged = torch.eye(3)
    diverged[0, 0] = math.inf
    assert not multiple_negatives_ranking_loss(diverged, torch.eye(3)).isfinite()


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda x: multiple_negatives_ranking_loss(x, x, similarity="cos"), "unknown similarity 'cos'. Did you mean"),
        (lambda x: multiple_negatives_ranking_loss(x, x, scale=0.0), "scale must be above 0, got 0.0"),
        (lambda x: multiple_negatives_ranking_loss(x, x[:2]), "got 3 anchors and 2 positives"),
        (lambda x: multiple_negatives_ranking_loss(x, x[:, :2]), "must have one width, got 4 and, for positives, 2"),
        (lambda x: multiple_negatives_ranking_loss(x, x, x[0]), "negatives must be floating-point embeddings"),
        (lambda x: multiple_negatives_ranking_loss(x, x, all_ranks=True), "needs an initialised torch.distributed"),
    ],
)
def test_wrong_arguments(call, text):
    with pytest.raises(UsageError, match=text):
        call(torch.ones(3, 4))
