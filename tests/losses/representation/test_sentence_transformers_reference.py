"""Multiple negatives ranking against sentence-transformers, value and gradients on embeddings in float64.

Optional: sentence-transformers 6.2.0, whose `compute_loss_from_embeddings` needs no model.
"""

from __future__ import annotations

import warnings

import pytest
import torch

from trimtab.losses import multiple_negatives_ranking_loss

PACKAGE = pytest.importorskip("sentence_transformers")


def _theirs(embeddings, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from sentence_transformers.losses import MultipleNegativesRankingLoss

    loss = MultipleNegativesRankingLoss(torch.nn.Identity(), **options)
    if not hasattr(loss, "compute_loss_from_embeddings"):
        pytest.skip(f"sentence-transformers {PACKAGE.__version__} has no loss of embeddings")
    return loss.compute_loss_from_embeddings(embeddings, None)


def _embeddings(count):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(6, 4, dtype=torch.float64, generator=generator).requires_grad_() for _ in range(count)]


def _same(ours, theirs, inputs):
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    found, expected = (torch.autograd.grad(loss, inputs, retain_graph=True) for loss in (ours, theirs))
    for mine, peer in zip(found, expected, strict=True):
        assert peer.abs().max() > 1e-3
        torch.testing.assert_close(mine, peer, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("columns", [0, 1, 2], ids=["pairs", "triplets", "two-negatives"])
@pytest.mark.parametrize("scale", [None, 3.0], ids=["default", "scale-3"])
def test_equals_sentence_transformers(columns, scale):
    """Each anchor has columns of negatives there; all of them are one matrix of further negatives here."""
    inputs = _embeddings(2 + columns)
    negatives = torch.cat(inputs[2:]) if columns else None
    options = {} if scale is None else {"scale": scale}
    ours = multiple_negatives_ranking_loss(*inputs[:2], negatives, similarity="cosine", scale=scale)
    _same(ours, _theirs(inputs, **options), inputs)


def test_dot_products():
    inputs = _embeddings(2)
    ours = multiple_negatives_ranking_loss(*inputs)
    _same(ours, _theirs(inputs, scale=1.0, similarity_fct=lambda a, b: a @ b.T), inputs)


def test_symmetric_is_both_directions_with_a_softmax_each():
    """Theirs sums one numerator against the mean of two normalisers; that is the mean of two cross-entropies."""
    inputs = _embeddings(2)
    options = {"directions": ("query_to_doc", "doc_to_query")}
    ours = multiple_negatives_ranking_loss(*inputs, similarity="cosine", symmetric=True)
    _same(ours, _theirs(inputs, partition_mode="per_direction", **options), inputs)
    # One softmax over both directions, their default, is another loss.
    assert _theirs(inputs, **options) > ours
