"""Structured feed-forward layers: low-rank and block-diagonal factors in place of the two matrices of an MLP.

    LowRank:       W x ≈ U V x,        V [rank, in], U [out, rank]
    BlockShuffle:  W x ≈ P2 U P1 V x,  U and V block-diagonal, P1 and P2 shuffles (as in Monarch matrices)
    BlockDense:    W x ≈ U V x,        V block-diagonal [rank, in], U [out, rank]

Trained from scratch, such products learn slowly or spike at first. Self-guided training lets a dense matrix lead:

    y = alpha W x + (1 - alpha) U V x,   alpha = (1 + cos(pi min(t / T, 1))) / 2,   W = U V at t = 0

Wei et al. 2024 (arXiv:2406.16450); authors' code CLAIRE-Labo/StructuredFFN at 5955174.
"""

from __future__ import annotations

from torch import nn

from trimtab.card import Card, Default, Experiment, Paper
from trimtab.errors import UsageError, choose
from trimtab.layers.structured._guided import GuidedLinear, finish_guidance, set_guided_step
from trimtab.layers.structured._layers import BlockDenseLinear, BlockShuffleLinear, LowRankLinear
from trimtab.layers.structured._linear import check_whole, densify, own_weight, swap

__all__ = ["BlockDenseLinear", "BlockShuffleLinear", "LowRankLinear", "finish_guidance", "set_guided_step"]

_FFN_NAMES = (
    ("fc1", "fc2"),
    ("c_fc", "c_proj"),
    ("linear1", "linear2"),
    ("lin1", "lin2"),
    ("gate_proj", "up_proj", "down_proj"),
    ("up_proj", "down_proj"),
)
_LOOKED_FOR = (
    "nn.Linear, activation, nn.Linear in a Sequential, back to the width they began with, or nn.Linear attributes "
    + ", ".join("/".join(names) for names in _FFN_NAMES)
)


_KINDS = {"low-rank": LowRankLinear, "block-shuffle": BlockShuffleLinear, "block-dense": BlockDenseLinear}
_INITS = ("orthonormal", "projected")


def _ffns(model: nn.Module) -> dict[str, list[nn.Linear]]:
    """Return the linear layers of every feed-forward block, by the name of the module that has them, in order."""
    own = own_weight(model)
    found: dict[str, list[nn.Linear]] = {}
    taken: set[int] = set()
    for name, module in model.named_modules():
        candidates = [[getattr(module, part, None) for part in names] for names in _FFN_NAMES]
        if isinstance(module, nn.Sequential):
            parts = list(module)
            candidates += [
                [first, last]
                for first, between, last in zip(parts, parts[1:], parts[2:], strict=False)
                if not isinstance(between, nn.Linear)
            ]
        for candidate in candidates:
            linears = [part for part in candidate if isinstance(part, nn.Linear) and id(part) in own]
            if len(linears) < len(candidate) or any(id(part) in taken for part in linears):
                continue
            *ups, down = linears
            if all((up.in_features, up.out_features) == (down.out_features, down.in_features) for up in ups):
                found.setdefault(name, []).extend(linears)
                taken.update(id(part) for part in linears)
    return found


def _structured(
    linear: nn.Linear, kind: str, rank: int | None, blocks: int, init: str, guided_steps: int, count_forwards: bool
) -> GuidedLinear:
    width = min(linear.in_features, linear.out_features)
    sizes: dict[str, int] = {} if kind == "low-rank" else {"blocks": blocks}
    if kind == "low-rank":
        sizes["rank"] = max(1, width // 2) if rank is None else rank
    elif kind == "block-dense":
        sizes["rank"] = max(blocks, 2 * width // 3 // blocks * blocks) if rank is None else rank
    projected = init == "projected"
    layer = _KINDS[kind](
        linear.in_features,
        linear.out_features,
        bias=False,
        guided_steps=guided_steps,
        count_forwards=count_forwards,
        device="meta" if projected else linear.weight.device,
        dtype=linear.weight.dtype,
        **sizes,
    )
    if projected:
        layer.to_empty(device=linear.weight.device)
        layer.project_(linear.weight)
        layer.begin_guidance()
    layer.bias = linear.bias
    return layer.train(linear.training)


def _apply(
    model: nn.Module,
    *,
    kind: str = "low-rank",
    rank: int | None = None,
    blocks: int = 2,
    init: str | None = None,
    guided_steps: int = 0,
    count_forwards: bool = True,
    keep_first: bool = True,
) -> dict[str, str]:
    """Make the linear layers of every feed-forward block of a model structured.

    Args:
        model: the model.
        kind: `"low-rank"`, `"block-shuffle"` or `"block-dense"`.
        rank: of low-rank (default half of the model's width) and block-dense (default two thirds of it).
        blocks: of block-shuffle and block-dense.
        init: `"projected"`, nearest to the weights that are there, or `"orthonormal"`; default the paper's, projected
            for low-rank and orthonormal for the others.
        guided_steps: T, steps of self-guided training; 0 for none.
        count_forwards: whether each training forward is a step of it; otherwise `set_guided_step` says the step.
        keep_first: whether the first feed-forward block stays dense.
    """
    choose("kind of structured layer", kind, _KINDS)
    init = init or ("projected" if kind == "low-rank" else "orthonormal")
    choose("init", init, _INITS)
    if kind == "low-rank" and init != "projected":
        raise UsageError("init='orthonormal' is for block-shuffle and block-dense: low-rank layers start projected.")
    ffns = list(_ffns(model).items())
    if len(ffns) <= keep_first:
        found = "only the first one, which keep_first keeps dense" if ffns else "none"
        raise UsageError(
            f"structured-ffn: no feed-forward block to change in {type(model).__name__}, found {found}. "
            f"Looked for {_LOOKED_FOR}."
        )
    names = {id(module): name for name, module in model.named_modules()}
    chosen = [linear for _, linears in ffns[keep_first:] for linear in linears]
    for linear in chosen:
        check_whole("structured-ffn", names[id(linear)], linear)
    replacements: dict[nn.Module, nn.Module] = {}
    changes: dict[str, str] = {}
    for linear in chosen:
        layer = _structured(linear, kind, rank, blocks, init, guided_steps, count_forwards)
        replacements[linear] = layer
        share = layer.factor_count() / linear.weight.numel()
        guided = f", guided for {guided_steps} steps" if guided_steps else ""
        changes[names[id(linear)]] = f"{kind}, {init}, {share:.0%} of the weights{guided}"
    swap(model, replacements)
    return changes


def _remove(model: nn.Module) -> dict[str, str]:
    """Turn every structured layer into an nn.Linear of the same function, a dense branch's share included."""
    return densify(model, tuple(_KINDS.values()))


CARD = Card(
    name="structured-ffn",
    room="layers",
    summary="low-rank or block-diagonal factors for the matrices of an MLP, guided by a dense branch at first",
    paper=Paper(
        "Building on Efficient Foundations: Effectively Training LLMs with Structured Feedforward Layers",
        2024,
        arxiv="2406.16450",
        code="https://github.com/CLAIRE-Labo/StructuredFFN",
    ),
    equation=(
        "y = alpha W x + (1 - alpha) U V x, alpha = (1 + cos(pi min(t / T, 1))) / 2; U, V low-rank or block-diagonal"
    ),
    claim=(
        "Structured FFNs have a steeper scaling curve in training FLOPs up to 1.3B parameters; self-guided training "
        "cures their loss spikes and slow start and brings them closer to dense models at the same training FLOPs "
        "(0.4 perplexity behind with 32 % of the FFN's parameters)."
    ),
    acts_on="model",
    entry="trimtab.layers.structured.structured_ffn:LowRankLinear",
    defaults=(
        Default("kind", "low-rank", "paper: the first of its three"),
        Default("rank", None, "authors' readme: 384 (low-rank), 512 (block-dense) at width 768, 63 % of the weights"),
        Default("blocks", 2, "authors' readme, for 63 % of the weights"),
        Default("init", None, "authors' code: svd for low-rank, ortho for the block forms"),
        Default("guided_steps", 0, "ours: the paper guides for half of the run, whose length a layer does not know"),
        Default("keep_first", True, "authors' code: first_layer is true in every configuration"),
        Default("count_forwards", True, "ours: with one forward a step it is the authors' update after each step"),
    ),
    verified={
        "equation": (
            "tests/layers/structured/test_structured_ffn.py::test_equals_its_expanded_matrix",
            "tests/layers/structured/test_structured_ffn.py::test_projection_error_is_that_of_the_singular_values",
            "tests/layers/structured/test_structured_ffn.py::test_guidance_is_the_papers_mixture",
            "tests/layers/structured/test_structured_ffn.py::test_finishing_leaves_no_dense_parameter",
        ),
    },
    deviations=(
        "The authors' training computes the dense branch in a random alpha of the steps to save FLOPs (reduce_flop); "
        "here every guided step computes it.",
        "The authors start block-shuffle's dense branch at the product of the block-diagonal matrices without their "
        "shuffles, so that it is not the layer's own matrix; here W = U V as the paper has it, shuffles included.",
        "Their low-rank factors come from the SVD of a new N(0, 0.02) matrix; `apply` takes the SVD of the weights "
        "there are, which is the same for a model just initialised, and LowRankLinear alone that of N(0, 1 / in).",
        "init='projected' for the block forms (their optimum in the Frobenius norm) is an addition.",
        "Only the paper's structure: no pre-merge cache; `remove` merges for good.",
    ),
    experiments=(
        Experiment(
            "trimtab.studies.structured:language_model",
            "layers=low-rank,lr=0.01",
            "layers=low-rank,guided=0.5,lr=0.01",
            mechanism="early_loss",
            outcome=(
                "worse at the same multiplications: test loss 2.836 to 2.998, difference +0.161 (95 % interval +0.054 "
                "to +0.268), n=5, with 54 steps for 67; early loss 4.84 to 4.78, difference -0.063 (-0.069 to -0.056), "
                "which is the shorter schedule's warm-up: on the same schedule it is 4.78 without guidance too. Short "
                "runs, one learning rate for both"
            ),
        ),
        Experiment(
            "trimtab.studies.structured:language_model",
            "layers=dense,lr=0.01",
            "layers=low-rank,lr=0.01",
            mechanism="steps",
            outcome=(
                "better at the same multiplications: test loss 2.960 to 2.836, difference -0.123 (95 % interval -0.195 "
                "to -0.051), n=5; 50 steps dense, 67 low-rank. Short runs, one learning rate for both"
            ),
        ),
    ),
    apply=_apply,
    remove=_remove,
)
