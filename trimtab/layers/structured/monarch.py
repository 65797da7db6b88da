"""Monarch matrices: two block-diagonal factors with fixed permutations in place of a dense matrix.

    M = P L P^T R        R and L block-diagonal, P a transposition of the index

With sqrt(n) blocks of sqrt(n), a product with M costs 2 n sqrt(n) in place of n^2, in two batched matrix products. The
Monarch matrix nearest to a dense one in the Frobenius norm has a closed form: the truncated SVD of each pair of blocks
(of rank 1 in that case). Dao et al. 2022 (arXiv:2204.00595); authors' code HazyResearch/fly.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.card import Card, Default, Experiment, Paper
from trimtab.errors import UsageError, choose
from trimtab.layers.structured._linear import (
    StructuredLinear,
    block_shuffle,
    check_whole,
    densify,
    own_weight,
    project_block_shuffle,
    shuffle_shapes,
    swap,
    working,
)
from trimtab.scalars import to_scalar

__all__ = ["MonarchLinear"]

_INITS = ("projected", "uniform")


class MonarchLinear(StructuredLinear):
    """A linear layer with a Monarch matrix: y = P L P^T R x + b.

    Widths that `blocks` does not divide are padded: the input with zeros, the surplus outputs are dropped. Factors
    start uniform in ±1 / sqrt(columns of a block), as nn.Linear's weight does with its columns.

    Args:
        in_features: width of the input.
        out_features: width of the output.
        blocks: of each factor, 1 to the smaller width.
        bias: whether to learn b.
        device: of the parameters.
        dtype: of the parameters.

    Shapes: [..., in] to [..., out].

    Raises:
        UsageError: if an argument breaks its rule.

    Example:
        >>> layer = MonarchLinear(16, 16, blocks=4, bias=False)
        >>> sum(p.numel() for p in layer.parameters())  # of 256
        128

    References:
        Dao et al. 2022, arXiv:2204.00595, sections 3.1 and 3.3.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        blocks: int = 4,
        *,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        if not 1 <= blocks <= min(in_features, out_features):
            raise UsageError(f"blocks must be 1 to {min(in_features, out_features)}, the smaller width, got {blocks}.")
        self.blocks = blocks
        self.in_padding, self.out_padding = -in_features % blocks, -out_features % blocks
        first, second = shuffle_shapes(in_features + self.in_padding, out_features + self.out_padding, blocks)
        self.r = nn.Parameter(torch.empty(first, device=device, dtype=dtype))
        self.l = nn.Parameter(torch.empty(second, device=device, dtype=dtype))
        for factor in (self.r, self.l):
            bound = 1 / math.sqrt(factor.shape[-1])
            nn.init.uniform_(factor, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -1 / math.sqrt(out_features), 1 / math.sqrt(out_features))

    @torch.no_grad()
    def project_(self, weight: Tensor) -> None:
        """Set the factors to the Monarch matrix nearest to `weight`: a truncated SVD for each pair of blocks."""
        padded = F.pad(working(weight), (0, self.in_padding, 0, self.out_padding))
        right, left = project_block_shuffle(padded, tuple(self.r.shape), tuple(self.l.shape))  # type: ignore[arg-type]
        self.r.copy_(right)
        self.l.copy_(left)

    def multiply(self, x: Tensor) -> Tensor:
        """Return M x."""
        y = block_shuffle(F.pad(x, (0, self.in_padding)) if self.in_padding else x, self.r, self.l)
        return y[..., : self.out_features] if self.out_padding else y


def _apply(
    model: nn.Module,
    *,
    blocks: int = 4,
    min_features: int = 64,
    init: str = "projected",
    skip: Sequence[str] = (),
) -> dict[str, str]:
    """Replace the nn.Linear modules of a model by Monarch layers, where that saves weights.

    Args:
        model: the model.
        blocks: of each factor; 1 would save nothing.
        min_features: smallest width, of input and output, of a layer that is replaced.
        init: `"projected"`, nearest to the weights that are there, or `"uniform"`, anew.
        skip: patterns (`"head"`, `"blocks.0.*"`) of names of modules to leave as they are.
    """
    choose("init", init, _INITS)
    if blocks < 2:
        raise UsageError(f"blocks must be at least 2 to save anything, got {blocks}: the default is 4.")
    skip = (skip,) if isinstance(skip, str) else tuple(skip)
    own = own_weight(model)
    chosen = {
        name: module
        for name, module in model.named_modules()
        if name
        and id(module) in own
        and min(module.in_features, module.out_features) >= max(min_features, blocks)
        and not any(fnmatch.fnmatchcase(name, pattern) for pattern in skip)
    }
    if not chosen:
        raise UsageError(
            f"monarch: no layer to change in {type(model).__name__}. Looked for nn.Linear modules in it, at least "
            f"{max(min_features, blocks)} wide, with a weight of their own."
        )
    replacements: dict[nn.Module, nn.Module] = {}
    changes: dict[str, str] = {}
    for name, linear in chosen.items():
        check_whole("monarch", name, linear)
    for name, linear in chosen.items():
        weight: Tensor = linear.weight
        layer = MonarchLinear(
            weight.shape[1],
            weight.shape[0],
            blocks,
            bias=linear.bias is not None,
            device="meta" if init == "projected" else weight.device,
            dtype=weight.dtype,
        ).train(linear.training)
        share = layer.factor_count() / weight.numel()
        what = f"{blocks} blocks, {share:.0%} of the weights"
        if init == "projected":
            layer.to_empty(device=weight.device)
            layer.project_(weight)
            layer.bias = linear.bias
            exact = working(weight)
            size = torch.linalg.matrix_norm(exact).clamp(min=torch.finfo(exact.dtype).tiny)
            error = torch.linalg.matrix_norm(working(layer.weight) - exact) / size
            what += f", relative error {to_scalar(error):.2f}"
        replacements[linear] = layer
        changes[name] = what
    swap(model, replacements)
    return changes


def _remove(model: nn.Module) -> dict[str, str]:
    """Turn every Monarch layer into an nn.Linear of the same function: the paper's reverse sparsification."""
    return densify(model, (MonarchLinear,))


CARD = Card(
    name="monarch",
    room="layers",
    summary="two block-diagonal factors with permutations for a dense matrix, with a closed-form projection",
    paper=Paper(
        "Monarch: Expressive Structured Matrices for Efficient and Accurate Training",
        2022,
        arxiv="2204.00595",
        code="https://github.com/HazyResearch/fly",
    ),
    equation="M = P L P^T R with L, R block-diagonal; nearest to A: the truncated SVD of each pair of blocks",
    claim=(
        "ViT and GPT-2 train twice as fast at equal quality; trained sparse for most of the run and dense at the end "
        "(reverse sparsification), GPT-2 trains twice as fast and BERT 23 % faster; 1.7 times faster GLUE fine-tuning."
    ),
    acts_on="model",
    entry="trimtab.layers.structured.monarch:MonarchLinear",
    defaults=(
        Default("blocks", 4, "authors' code: nblocks of MonarchLinear"),
        Default("min_features", 64, "ours: below it two small products cost more than one"),
        Default("init", "projected", "paper, section 3.3: dense-to-sparse; from scratch the authors start uniform"),
        Default("skip", (), "ours"),
    ),
    verified={
        "equation": (
            "tests/layers/structured/test_monarch.py::test_is_the_papers_product",
            "tests/layers/structured/test_monarch.py::test_projection_error_is_that_of_the_singular_values",
            "tests/layers/structured/test_monarch.py::test_projection_recovers_a_monarch_matrix",
            "tests/layers/structured/test_monarch.py::test_removing_keeps_the_function",
            "tests/layers/structured/test_monarch.py::test_equals_the_authors_formula",
        ),
    },
    deviations=(
        "The authors' projection is for square matrices with sqrt(n) blocks; here it is extended to every shape that "
        "MonarchLinear has, where a pair of blocks has as many links as its rank.",
        "Both factors have the same number of blocks, as in the authors' MonarchLinear; the paper allows two numbers.",
        "The authors' hand-written backward is left out: autograd gives the same gradient.",
    ),
    experiments=(
        Experiment(
            "trimtab.studies.structured:language_model",
            "layers=dense,lr=0.01",
            "layers=monarch,lr=0.01",
            mechanism="steps",
            outcome=(
                "no evidence at the same multiplications: test loss 2.96 to 2.83, difference -0.130 (95 % interval "
                "-0.348 to +0.089), n=5; 50 steps dense, 113 Monarch. Short runs, one learning rate for both"
            ),
        ),
    ),
    apply=_apply,
    remove=_remove,
)
