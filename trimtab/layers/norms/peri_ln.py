"""Peri-LN: normalise what goes into every sublayer and what comes out of it, around the residual stream.

A pre-LN block adds f(N(x)), whose size nothing bounds: as weights grow, the variance of the residual stream grows with
depth faster than linearly, and single activations become massive. Peri-LN adds a normalised output instead:

    y = x + N_out( f( N_in(x) ) )

so that every sublayer adds a variance of about its gain squared, and the stream's grows linearly. Kim et al. 2025
(arXiv:2502.02732); Gemma 2 and 3 have it. The blocks themselves are `trimtab.layers.ResidualBlock` and
`trimtab.layers.ResidualStack`; this module puts output norms into a pre-LN model that exists.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from trimtab.card import Card, Default, Experiment, Paper
from trimtab.errors import UsageError
from trimtab.layers.norms._residual_branches import (
    detach_hook,
    first_blocks,
    forget_fused_paths,
    norm_like,
    normalized,
    residual_branches,
)

__all__: list[str] = []


def _normalize_output(sublayer: nn.Module, args: Any, output: Any) -> Any:
    """Forward hook of a sublayer: unlike a wrapper, it leaves names, parametrizations and sharding as they are."""
    return normalized(sublayer.peri_norm, output)  # type: ignore[arg-type]


def _normalize_embedding(block: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Forward pre-hook of the first block."""
    if not args:
        raise UsageError("peri-ln: the first block is called without positional arguments: use embedding_norm=False.")
    return (normalized(block.embedding_norm, args[0]), *args[1:])  # type: ignore[arg-type]


def _apply(model: nn.Module, *, embedding_norm: bool = False) -> dict[str, str]:
    """Normalise the output of every sublayer of a pre-LN model, and on request what goes into its first block."""
    branches = residual_branches(model, "peri-ln")
    for branch in branches:
        for name in ("peri_norm", "res_post_norm"):
            if name in branch.function._modules:
                raise UsageError(f"peri-ln: the output of {branch.name!r} is normalised already, by its {name}.")
    norms = [norm_like(branch.input_norm, "peri-ln") for branch in branches]
    changes: dict[str, str] = {}
    if embedding_norm:
        like = {branch.block: branch.input_norm for branch in reversed(branches)}
        for name, block in first_blocks(branches).items():
            block.add_module("embedding_norm", norm_like(like[name], "peri-ln"))
            block.register_forward_pre_hook(_normalize_embedding)
            changes[name] = f"{type(block.embedding_norm).__name__} over what goes into it"
    for branch, norm in zip(branches, norms, strict=True):
        branch.function.add_module("peri_norm", norm)
        branch.function.register_forward_hook(_normalize_output)
        changes[branch.name] = f"{type(norm).__name__} over its output"
    forget_fused_paths(model, branches)
    return changes


def _remove(model: nn.Module) -> dict[str, str]:
    """Take the output norms out again: the structure and function are those of pre-LN."""
    changes: dict[str, str] = {}
    for name, module in model.named_modules():
        if detach_hook(module, _normalize_embedding):
            del module.embedding_norm
            changes[name] = "what goes into it is not normalised"
        if detach_hook(module, _normalize_output):
            del module.peri_norm
            changes[name] = "its output is not normalised"
    return changes


CARD = Card(
    name="peri-ln",
    room="layers",
    summary="norms on the output of every sublayer too, so that the residual stream grows linearly with depth",
    paper=Paper("Peri-LN: Revisiting Normalization Layer in the Transformer Architecture", 2025, arxiv="2502.02732"),
    equation="y = x + N(f(N(x))); model: N(embedding) at will, blocks, N(y_last)",
    claim=(
        "Against Pre-LN and Post-LN in transformers up to 3.2B parameters: variance of the hidden states grows about "
        "linearly with depth where Pre-LN's grows exponentially in training, no massive activations, flatter gradient "
        "norms over layers, fewer diverged runs over learning rates and seeds, and a lower loss."
    ),
    acts_on="model",
    entry="trimtab.layers.norms.norm_placement:ResidualBlock",
    treats={"massive-activations": 1, "residual-growth": 1, "exploding-gradient": 4, "overflow": 4},
    defaults=(
        Default("norm_placement", "peri", "paper, section 3: norms around the sublayer"),
        Default("embedding_norm", False, "paper: optional; `ResidualStack` has it on for Peri-LN"),
    ),
    verified={
        "equation": (
            "tests/layers/norms/test_norm_placement.py::test_equals_plain_loops",
            "tests/layers/norms/test_peri_ln.py::test_a_changed_block_equals_the_equation",
            "tests/layers/norms/test_peri_ln.py::test_the_stream_grows_linearly_whatever_the_weights",
            "tests/studies/test_norm_placement.py::test_peri_grows_linearly_where_pre_does_not",
        ),
        "reference": (
            "tests/layers/norms/test_norm_placement.py::test_pre_and_post_equal_torch",
            "tests/layers/norms/test_peri_ln.py::test_equals_gemma2",
        ),
    },
    deviations=(
        "The equation is CogView's sandwich-LN (arXiv:2105.13290) too; the norm of the embedding tells the two apart "
        "here, and sandwich-LN's division by the largest activation before each LayerNorm is left out.",
        "The paper's text was not at hand beyond its abstract and summaries: the optional embedding norm and the final "
        "norm are recalled, and agree with public Peri-LN ladders of OLMo-core.",
        "Where a model's dropout is inside the sublayer, the output norm comes behind it; the block's own dropout and "
        "LayerScale come behind the output norm.",
        "Applied to a trained model it changes the function: it needs training again.",
    ),
    experiments=(
        Experiment(
            "trimtab.studies.norm_placement:depth_profile",
            "placement=pre,lr=0.003",
            "placement=peri,lr=0.003",
            metric="exponent",
            mechanism="massive",
            outcome=(
                "no evidence: exponent 1.41 to 1.35, difference -0.057 (95 % interval -0.173 to +0.058), n=5 (at "
                "initialisation 1.14 to 0.91, difference -0.237, -0.279 to -0.196); largest over median activation "
                "6.5 to 8.0: worse, difference +1.51 (+0.77 to +2.25)"
            ),
        ),
        Experiment(
            "trimtab.studies.norm_placement:depth_profile",
            "placement=pre,lr=0.003",
            "placement=peri,lr=0.003",
            metric="gradient_ratio",
            mechanism="initial_gradient_ratio",
            outcome=(
                "no evidence: ratio 6.4 to 6.6, difference +0.20 (95 % interval -2.48 to +2.88), n=5; at "
                "initialisation 4.8 to 3.5, difference -1.33 (-3.17 to +0.50)"
            ),
        ),
        Experiment(
            "trimtab.studies.norm_placement:depth_profile",
            "placement=pre,lr=0.003",
            "placement=peri,lr=0.003",
            metric="loss",
            mechanism="last_variance",
            outcome=(
                "better: loss 2.837 to 2.684, difference -0.154 (95 % interval -0.197 to -0.110), n=5; variance of "
                "the last block's stream 124.4 to 124.2, no evidence; with pre-LN at lr=0.01, where its loss is "
                "3.000, it is 2,225"
            ),
        ),
        Experiment(
            "trimtab.studies.norm_placement:diverged_rates",
            "placement=pre",
            "placement=peri",
            metric="diverged",
            mechanism="mean_loss",
            outcome=(
                "no evidence: none of the 5 rates diverged on any of 5 seeds in either arm; mean loss 3.407 to 3.387,"
                " difference -0.020 (95 % interval -0.058 to +0.017)"
            ),
        ),
    ),
    apply=_apply,
    remove=_remove,
)
