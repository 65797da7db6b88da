"""Stable embedding: an embedding whose gradients vary less, for training with optimizer states in 8 bits.

Dettmers et al. 2022 (arXiv:2110.02861), section 2.3: words are not equally frequent, so the gradients of an embedding
vary far more than those of other layers, and its moments quantise badly. The layer starts from the Xavier uniform
distribution, normalises what it looks up, and asks for moments in 32 bits:

    y = LayerNorm(W[ids]),  W ~ U(-a, a),  a = sqrt(6 / (V + D))

Shape suffixes: B any leading dimensions, V vocabulary, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from trimtab.card import Card, Paper

__all__ = ["StableEmbedding"]


class StableEmbedding(nn.Embedding):
    """An embedding with Xavier uniform weights, layer normalisation after the lookup, and 32-bit optimizer states.

    y = LayerNorm(W[ids]), W ~ U(-a, a), a = sqrt(6 / (V + D)). The weight carries `optim_state = "fp32"`, which
    optimizers of this package that keep their moments in few bits honour; it is not part of a checkpoint, as every
    layer sets it anew.

    Shapes: ids [B...] -> [B..., D], in the dtype of the weight.

    Args:
        num_embeddings: V, entries of the vocabulary.
        embedding_dim: D, width.
        **options: those of `torch.nn.Embedding`: padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse, device,
            dtype.

    Example:
        >>> import torch
        >>> embedding = StableEmbedding(100, 8)
        >>> embedding(torch.tensor([[3, 5]])).shape, embedding.weight.optim_state
        (torch.Size([1, 2, 8]), 'fp32')

    References:
        Dettmers et al. 2022, arXiv:2110.02861; authors' code bitsandbytes, bitsandbytes/nn/modules.py.
    """

    norm: nn.LayerNorm

    def __init__(self, num_embeddings: int, embedding_dim: int, **options: Any) -> None:
        super().__init__(num_embeddings, embedding_dim, **options)
        self.norm = nn.LayerNorm(embedding_dim, device=options.get("device"))
        self._flag()

    def _flag(self) -> None:
        self.weight.optim_state = "fp32"  # type: ignore[attr-defined]

    # Copies, and moves that replace the weight, lose the attributes of a parameter.
    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._flag()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> StableEmbedding:
        super()._apply(fn, recurse)
        self._flag()
        return self

    def reset_parameters(self) -> None:
        """Draw the weight anew, from U(-a, a) with a = sqrt(6 / (V + D)); the row of `padding_idx` is zero."""
        nn.init.xavier_uniform_(self.weight)
        self._fill_padding_idx_with_zero()

    def forward(self, input: Tensor) -> Tensor:
        """Return the normalised embeddings of ids [B...], as [B..., D]; the normalisation is computed in its own dtype.

        Args:
            input: ids, integers in [0, V).

        Returns:
            [B..., D], in the dtype of the weight.
        """
        return self.norm(super().forward(input).to(self.norm.weight.dtype)).to(self.weight.dtype)


CARD = Card(
    name="stable-embedding",
    room="optim",
    summary="embedding with Xavier uniform weights, layer normalisation and 32-bit optimizer states",
    paper=Paper(
        "8-bit Optimizers via Block-wise Quantization",
        2022,
        arxiv="2110.02861",
        code="https://github.com/bitsandbytes-foundation/bitsandbytes",
    ),
    equation="y = LayerNorm(W[ids]), W ~ U(-a, a), a = sqrt(6 / (V + D)); moments of W in 32 bits",
    claim="Makes training with 8-bit optimizer states stable for language models, whose tokens differ in frequency.",
    acts_on="optimizer",
    entry="trimtab.optim.stable_embedding:StableEmbedding",
    verified={
        "equation": (
            "tests/optim/test_stable_embedding.py::test_equals_the_equation",
            "tests/optim/test_stable_embedding.py::test_weights_are_xavier_uniform",
        ),
        "reference": ("tests/optim/test_stable_embedding.py::test_equals_the_authors_layer",),
    },
    deviations=(
        "It is a layer of a model, listed with the optimizers because its purpose is their 8-bit states; "
        "it has no apply.",
        "The authors' code registers the 32-bit override with a global manager; here the weight itself carries it, as "
        "the attribute optim_state.",
        "The authors' code normalises in torch's default dtype; here in the dtype of the normalisation's own weight, "
        "which is the default dtype unless the model has been converted.",
    ),
)
