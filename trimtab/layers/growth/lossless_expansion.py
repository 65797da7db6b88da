"""LEMON: a wider and deeper model that computes exactly what a trained small one does, ready to be trained on.

From width D to D', with k = floor(D' / D) whole copies and r = D' - k D places left:

    residual stream   x' = [x, ..., x, mean(x), ..., mean(x)]               (average expansion)
    LayerNorm         mu' = [eta mu, ..., eta mu, any], b' = [b, ..., b, 0], eps' = eta^2 eps, eta^2 = k D / D'
    its readers       W' with copies that add up to W and unlike each other, and any values at the r places, which are 0
    hidden neurons    [h, ..., h, h_1, ..., h_r] (circular expansion), their readers split likewise; heads as neurons
    new blocks        copies of a block with their output projections 0

Copies that differ break the symmetry that would keep duplicated neurons equal for ever. Wang et al. 2023
(arXiv:2310.07999), with the authors' code for the residual places of LayerNorm and the order of the blocks.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from trimtab.card import Card, Default, Experiment, Paper
from trimtab.errors import UsageError
from trimtab.layers._sharding import is_sharded
from trimtab.layers.growth._lossless_stream import (
    NORMS,
    Draw,
    Stream,
    assign,
    exact,
    exact_bias,
    read_stream,
    set_linear,
    split,
    widen_norm,
    write_stream,
)
from trimtab.scalars import to_scalar
from trimtab.undisturbed import undisturbed

__all__ = ["lossless_expand"]

_MIXING = (nn.Softmax, nn.LogSoftmax, nn.Softmin, nn.GLU)
_LOOKED_FOR = (
    "a ModuleList or Sequential of pre-LN blocks (norm1, attention or attn with a fused qkv and proj, norm2, mlp of "
    "two linear layers), or a Sequential of linear layers and activations"
)


def lossless_expand(
    model: nn.Module,
    *,
    width: int | None = None,
    depth: int | None = None,
    std: float = 0.02,
    seed: int = 0,
    example: Tensor | None = None,
) -> nn.Module:
    """Return a larger model of the same function; the given one stays as it is.

    Pre-LN transformers grow in width (with more heads of the same size, and MLPs in proportion) and in depth; a plain
    MLP, an nn.Sequential of linear layers and activations, in the width of its hidden layers.

    The paper then trains the larger model with its usual largest learning rate and a schedule that decays sooner: 130
    epochs in place of 300 for a vision transformer. A new optimizer is needed: `trimtab.schedule.GrowthSchedule` makes
    one in the middle of a run, with this function as its growth.

    Args:
        model: pre-LN transformer or plain MLP.
        width: D', of the residual stream (a multiple of the heads' width) or of every hidden layer; default as it is.
        depth: blocks, at least as many as there are; default as many.
        std: of the values from N(0, std^2) that copies are made to differ by; 0 splits evenly and keeps the symmetry.
        seed: of these values.
        example: an input of the model, on which to check that the function stays.

    Returns:
        A new model with the device, dtype and mode of the old one.

    Raises:
        UsageError: if the model has another structure, a size is smaller than it was or cannot be had, or the function
            on `example` changes by more than rounding.

    Example:
        >>> mlp = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> wide = lossless_expand(mlp, width=5)
        >>> x = torch.linspace(-1, 1, 4)
        >>> wide[0].out_features, torch.allclose(wide(x), mlp(x), atol=1e-6)
        (5, True)

    References:
        Wang et al. 2023, arXiv:2310.07999, sections 4 and 5.
    """
    if std < 0:
        raise UsageError(f"std must be at least 0, got {std}: 0.02 is the default.")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise UsageError("the model is on the meta device: expand it once it has weights.")
    if is_sharded(model):
        raise UsageError("the model is sharded already: expand it before fully_shard.")
    if any(parametrize.is_parametrized(module) for module in model.modules()):
        raise UsageError("the model has parametrized weights: remove their methods first, and apply them again after.")
    draw = Draw(std, seed)
    larger = copy.deepcopy(model)
    found = _find_blocks(larger)
    if found is not None:
        parent, name, blocks = found
        parts = [_parts(block, f"{name}.{i}") for i, block in enumerate(blocks)]
        if width is not None:
            _widen_transformer(larger, parts, width, draw)
        if depth is not None:
            _deepen(parent, name, depth)
    elif isinstance(larger, nn.Sequential) and sum(isinstance(part, nn.Linear) for part in larger) > 1:
        if depth is not None:
            raise UsageError(
                "depth grows without loss only where blocks add to a residual stream: a plain MLP has none."
            )
        _widen_mlp(larger, width, draw)
    else:
        raise UsageError(f"nothing to expand in {type(model).__name__}. Looked for {_LOOKED_FOR}.")
    if example is not None:
        _check(model, larger, example)
    return larger


@dataclass(frozen=True)
class _Parts:
    """What a pre-LN block is made of."""

    block: nn.Module
    norm1: nn.Module
    attention: nn.Module
    qkv: nn.Linear
    proj: nn.Linear
    norm2: nn.Module
    first: nn.Linear
    last: nn.Linear


def _find_blocks(model: nn.Module) -> tuple[nn.Module, str, list[nn.Module]] | None:
    """Return the module that has a list of pre-LN blocks, the list's name in it, and the blocks."""
    for parent in model.modules():
        for name, child in parent.named_children():
            if type(child) in (nn.ModuleList, nn.Sequential) and len(child):  # type: ignore[arg-type]
                blocks = list(child)  # type: ignore[call-overload]
                if all(_attention(block) is not None and hasattr(block, "norm1") for block in blocks):
                    return parent, name, blocks
    return None


def _attention(block: nn.Module) -> nn.Module | None:
    attention = getattr(block, "attention", getattr(block, "attn", None))
    fused = all(isinstance(getattr(attention, name, None), nn.Linear) for name in ("qkv", "proj"))
    return attention if fused and hasattr(attention, "num_heads") and hasattr(attention, "head_dim") else None


def _parts(block: nn.Module, name: str) -> _Parts:
    attention: nn.Module = _attention(block)  # type: ignore[assignment]
    mlp = getattr(block, "mlp", None)
    linears = [part for part in mlp.children() if isinstance(part, nn.Linear)] if isinstance(mlp, nn.Module) else []
    norms = [getattr(block, slot, None) for slot in ("norm1", "norm2")]
    kinds = {isinstance(norm, nn.LayerNorm) for norm in norms}
    if len(linears) != 2 or len(kinds) > 1 or not all(isinstance(norm, NORMS) for norm in norms):
        raise UsageError(
            f"{name} is no pre-LN block with two norms of one kind, LayerNorm or RMSNorm, and an MLP of two linear "
            "layers."
        )
    qkv, proj = attention.qkv, attention.proj
    known = {id(p) for part in (*linears, *norms, qkv, proj) for p in part.parameters()}  # type: ignore[union-attr]
    known |= {id(p) for slot in ("q_norm", "k_norm") for p in getattr(attention, slot, nn.Identity()).parameters()}
    for parameter, value in block.named_parameters():
        if id(value) not in known:
            raise UsageError(f"{name}.{parameter} is not known to be lossless to expand: take it out first.")
    return _Parts(block, norms[0], attention, qkv, proj, norms[1], *linears)  # type: ignore[arg-type]


def _widen_transformer(model: nn.Module, parts: list[_Parts], width: int, draw: Draw) -> None:
    attention = parts[0].attention
    old, head_dim, heads = parts[0].qkv.in_features, int(attention.head_dim), int(attention.num_heads)  # type: ignore[arg-type]
    if width < old or width % head_dim or heads * head_dim != old:
        raise UsageError(
            f"width must be a multiple of the heads' width {head_dim} and at least {old}, got {width}: "
            f"the next is {max(old, -(-width // head_dim) * head_dim)}."
        )
    norms = [part for layer in parts for part in (layer.norm1, layer.norm2)]
    stream = Stream(old, width, averaged=isinstance(norms[0], nn.LayerNorm))
    inside = {id(module) for layer in parts for module in layer.block.modules()}
    _widen_outside(model, inside, stream, draw)
    every_head = torch.arange(width // head_dim) % heads
    units = (every_head.unsqueeze(1) * head_dim + torch.arange(head_dim)).flatten()
    for i, layer in enumerate(parts):
        for norm in (layer.norm1, layer.norm2):
            widen_norm(norm, f"a norm of block {i}", stream, draw)
        read_stream(layer.qkv, torch.cat([part * old + units for part in range(3)]), stream, draw)
        write_stream(layer.proj, units, stream, draw)
        layer.attention.num_heads = len(every_head)  # type: ignore[assignment]
        hidden = layer.first.out_features
        neurons = torch.arange(-(-hidden * width // old)) % hidden
        read_stream(layer.first, neurons, stream, draw)
        write_stream(layer.last, neurons, stream, draw)


def _outside(model: nn.Module, inside: set[int]) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        own = any(parameter is not None for parameter in module._parameters.values())
        if id(module) not in inside and (own or isinstance(module, NORMS)):
            yield name, module


def _widen_outside(model: nn.Module, inside: set[int], stream: Stream, draw: Draw) -> None:
    """Widen what is before and after the blocks: embeddings, the last norm, the head."""
    modules = list(_outside(model, inside))
    tables = {id(module.weight): module for _, module in modules if isinstance(module, nn.Embedding)}
    tied = [module for _, module in modules if isinstance(module, nn.Linear) and id(module.weight) in tables]
    owner = {id(head): tables[id(head.weight)] for head in tied}
    norms = [module for _, module in modules if isinstance(module, NORMS)]
    if any(isinstance(norm, nn.LayerNorm) != stream.averaged for norm in norms):
        raise UsageError("a stream that both LayerNorm and RMSNorm read cannot be expanded without loss.")
    if tied and len(norms) != 1:
        raise UsageError(f"a head tied to the embedding needs one norm before it, found {len(norms)}: untie it first.")
    for name, module in modules:
        if id(module) in owner:
            continue
        if isinstance(module, NORMS):
            # The tied head adds up whole copies of its rows, where a free one has copies that add up to them.
            widen_norm(module, name, stream, draw, 1 / stream.copies if tied else 1.0)
        elif isinstance(module, nn.Embedding) and module.embedding_dim == stream.old:
            assign(module, "weight", stream.extend(exact(module.weight), 1))
            module.embedding_dim = stream.new
        elif isinstance(module, nn.Linear) and module.in_features == stream.old != module.out_features:
            read_stream(module, torch.arange(module.out_features), stream, draw)
        elif isinstance(module, nn.Linear) and module.out_features == stream.old != module.in_features:
            write_stream(module, None, stream, draw)
        elif isinstance(module, nn.Conv2d) and module.out_channels == stream.old:
            for part in ("weight", "bias") if module.bias is not None else ("weight",):
                assign(module, part, stream.extend(exact(getattr(module, part)), 0))
            module.out_channels = stream.new
        else:
            _widen_own(name, module, stream)
    for head in tied:
        head.weight, head.in_features = owner[id(head)].weight, stream.new


def _widen_own(name: str, module: nn.Module, stream: Stream) -> None:
    """Widen parameters that a module of its own kind has: positions and class tokens, whose last dimension is D."""
    plain = not isinstance(module, (nn.Linear, nn.Embedding, nn.modules.conv._ConvNd))
    for part, parameter in list(module.named_parameters(recurse=False)):
        if stream.old not in parameter.shape:
            continue
        if not plain or parameter.shape[-1] != stream.old:
            where = f"{name}.{part}" if name else part
            raise UsageError(f"{where} of shape {tuple(parameter.shape)} is not known to be lossless to expand.")
        assign(module, part, stream.extend(exact(parameter), parameter.dim() - 1))


def _deepen(parent: nn.Module, name: str, depth: int) -> None:
    """Put silent copies behind the last blocks, as many as are wanted; at most doubles the blocks at a time."""
    container: nn.Module = getattr(parent, name)
    blocks = list(container.children())
    if depth < len(blocks):
        raise UsageError(f"depth must be at least {len(blocks)}, the blocks there are, got {depth}.")
    while len(blocks) < depth:
        alone = max(0, 2 * len(blocks) - depth)
        grown = blocks[:alone]
        for block in blocks[alone:]:
            grown += [block, _silent(block)]
        blocks = grown
    setattr(parent, name, nn.ModuleList(blocks) if type(container) is nn.ModuleList else nn.Sequential(*blocks))


def _silent(block: nn.Module) -> nn.Module:
    """Return a copy of a block that adds nothing to the stream yet."""
    silent = copy.deepcopy(block)
    parts = _parts(silent, "block")
    for linear in (parts.proj, parts.last):
        for parameter in linear.parameters():
            parameter.data.zero_()
    return silent


def _widen_mlp(model: nn.Sequential, width: int | None, draw: Draw) -> None:
    linears = [part for part in model if isinstance(part, nn.Linear)]
    if len({id(linear.weight) for linear in linears}) < len(linears):
        raise UsageError("a plain MLP whose layers share a weight is not known to be lossless to expand.")
    between = itertools.takewhile(lambda part: part is not linears[-1], model)
    if mixing := next((part for part in between if isinstance(part, _MIXING)), None):
        raise UsageError(f"a {type(mixing).__name__} over hidden neurons cannot be expanded without loss.")
    for part in model:
        if not isinstance(part, nn.Linear) and any(True for _ in part.parameters()):
            raise UsageError(f"a {type(part).__name__} in a plain MLP is not known to be lossless to expand.")
    largest = max(linear.out_features for linear in linears[:-1])
    if width is None or width < largest:
        raise UsageError(f"width must be at least {largest}, the widest hidden layer, got {width}.")
    for before, after in itertools.pairwise(linears):
        neurons = torch.arange(width) % before.out_features
        bias = exact_bias(before)
        set_linear(before, exact(before.weight)[neurons], None if bias is None else bias[neurons])
        set_linear(after, split(exact(after.weight), neurons, draw), None)


def _check(model: nn.Module, larger: nn.Module, example: Tensor) -> None:
    with undisturbed(model), undisturbed(larger), torch.no_grad():
        expected, got = model.eval()(example), larger.eval()(example)
    error, size = to_scalar((got - expected).abs().max()), to_scalar(expected.abs().max())
    if not error <= 1e3 * torch.finfo(expected.dtype).eps * max(size, 1.0):
        raise UsageError(
            f"the larger model differs by {error:.2g} on the example: this structure is not expanded losslessly."
        )


CARD = Card(
    name="lemon",
    room="layers",
    summary="expands a trained model in width and depth without changing its function, and breaks the symmetry",
    paper=Paper("LEMON: Lossless Model Expansion", 2023, arxiv="2310.07999"),
    equation=(
        "x' = [x, ..., x, mean(x), ...]; mu' = eta [mu, ..., mu, any], b' = [b, ..., b, 0], eps' = eta^2 eps, "
        "eta^2 = floor(D' / D) D / D'; copies of a reader's columns differ and add up to W; new blocks project to 0"
    ),
    claim=(
        "Against training from scratch, a vision transformer grown from a trained smaller one reaches its accuracy "
        "with 56.7 % less compute and BERT its loss with 33.2 % less, at the usual largest learning rate and a "
        "schedule that decays sooner."
    ),
    acts_on="run",
    entry="trimtab.layers.growth.lossless_expansion:lossless_expand",
    defaults=(
        Default("std", 0.02, "authors' code: the initialisation of BERT and ViT, projected onto copies that add up"),
        Default("width", None, "ours: as it is"),
        Default("depth", None, "ours: as it is"),
    ),
    verified={
        "equation": (
            "tests/layers/growth/test_lossless_expansion.py::test_language_model_keeps_its_logits",
            "tests/layers/growth/test_lossless_expansion.py::test_layer_norm_is_the_papers",
            "tests/layers/growth/test_lossless_expansion.py::test_copies_differ_and_add_up",
            "tests/layers/growth/test_lossless_expansion.py::test_duplicated_neurons_part_in_training",
        ),
    },
    deviations=(
        "Text of the paper recalled; formulas checked against the authors' code for pre-LN BERT (inflate and "
        "project_linear). Of its two ways to split columns this is 'projection', which takes any number of copies; "
        "for BERT the authors use the other one, W - R and R, with R scaled by 0.1.",
        "New blocks keep the inner weights of the block they follow; the authors fill their additional neurons from "
        "the block after it (advanced knowledge initialisation).",
        "Not expanded: width of a head, post-LN models, convolutional networks. More than doubled depth repeats the "
        "step. RMSNorm streams are padded with zeros (the paper's zero expansion).",
    ),
    experiments=(
        Experiment(
            "trimtab.studies.expansion:growth",
            "start=scratch,lr=0.01",
            "start=expanded,lr=0.01",
            mechanism="bump",
            outcome=(
                "better at the same multiplications, the small model's counted: test loss 3.048 to 2.769, difference "
                "-0.279 (95 % interval -0.364 to -0.193), n=5; the expansion itself moves the loss by 5e-8. Short "
                "runs, one learning rate for both"
            ),
        ),
    ),
)
