"""Tune mode: fold frozen batch-normalisation statistics into the convolution before it on the fly.

In transfer learning batch normalisation usually runs in evaluation mode, with statistics that no longer change:
y = gamma (conv(x; W, b) - mu) / sqrt(var + eps) + beta. As both maps are linear, the same value and the same gradients
with respect to W, b, gamma, beta and x come from one convolution,

    W' = W gamma / sqrt(var + eps),   b' = beta + (b - mu) gamma / sqrt(var + eps),   y = conv(x; W', b'),

which neither computes nor keeps the feature map between the two. Deploy mode trains W' and b' themselves: it costs the
same, but its gradients are others, and training becomes unstable where gamma / sqrt(var + eps) is far from 1. You et
al. 2023 (arXiv:2305.11624); also in torch._inductor as efficient_conv_bn_eval, and in MMCV.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from trimtab.card import Card, Default, Experiment, Paper
from trimtab.errors import UsageError
from trimtab.undisturbed import undisturbed

__all__ = ["deploy_conv_bn", "tune_conv_bn"]


class _Tuned:
    """A convolution that computes the batch normalisation after it too, while that is in evaluation mode."""

    # In a tuple, so that it is no submodule: parameters and state dict stay where they are.
    _norm: tuple[_BatchNorm]

    def forward(self, x: Tensor) -> Tensor:
        norm = self._norm[0]
        return _convolve(self, x, None if norm.training else norm)  # type: ignore[arg-type]


class _TunedConv1d(_Tuned, nn.Conv1d):
    pass


class _TunedConv2d(_Tuned, nn.Conv2d):
    pass


class _TunedConv3d(_Tuned, nn.Conv3d):
    pass


class _TunedConvTranspose1d(_Tuned, nn.ConvTranspose1d):  # type: ignore[misc]
    pass


class _TunedConvTranspose2d(_Tuned, nn.ConvTranspose2d):  # type: ignore[misc]
    pass


class _TunedConvTranspose3d(_Tuned, nn.ConvTranspose3d):  # type: ignore[misc]
    pass


class _Folded:
    """A batch normalisation that the convolution before it computes in evaluation mode."""

    _frozen: bool
    _was_training: bool

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self.training else x  # type: ignore[attr-defined, misc]

    def train(self, mode: bool = True) -> nn.Module:
        return super().train(mode and not self._frozen)  # type: ignore[misc]


class _FoldedBatchNorm1d(_Folded, nn.BatchNorm1d):  # type: ignore[misc]
    pass


class _FoldedBatchNorm2d(_Folded, nn.BatchNorm2d):  # type: ignore[misc]
    pass


class _FoldedBatchNorm3d(_Folded, nn.BatchNorm3d):  # type: ignore[misc]
    pass


_CONVS: dict[type, type] = {
    nn.Conv1d: _TunedConv1d,
    nn.Conv2d: _TunedConv2d,
    nn.Conv3d: _TunedConv3d,
    nn.ConvTranspose1d: _TunedConvTranspose1d,
    nn.ConvTranspose2d: _TunedConvTranspose2d,
    nn.ConvTranspose3d: _TunedConvTranspose3d,
}
_NORMS: dict[type, type] = {
    nn.BatchNorm1d: _FoldedBatchNorm1d,
    nn.BatchNorm2d: _FoldedBatchNorm2d,
    nn.BatchNorm3d: _FoldedBatchNorm3d,
}
_TRANSPOSED = {3: F.conv_transpose1d, 4: F.conv_transpose2d, 5: F.conv_transpose3d}


def _fold(conv: _ConvNd, norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    """Return W' and b', in the dtype of the weight and computed in float32 or better."""
    wide = torch.promote_types(conv.weight.dtype, torch.float32)
    scale = torch.rsqrt(norm.running_var.to(wide) + norm.eps)  # type: ignore[union-attr]
    if norm.weight is not None:
        scale = norm.weight.to(wide) * scale
    shift = -norm.running_mean.to(wide) if conv.bias is None else conv.bias.to(wide) - norm.running_mean.to(wide)  # type: ignore[union-attr]
    bias = shift * scale
    if norm.bias is not None:
        bias = norm.bias.to(wide) + bias
    weight, taps = conv.weight.to(wide), [1] * (conv.weight.dim() - 2)
    if conv.transposed:  # [C, M / groups, k...]: the filters are the second dimension, group by group
        weight = weight.unflatten(0, (conv.groups, -1)) * scale.reshape(conv.groups, 1, -1, *taps)
        weight = weight.flatten(0, 1)
    else:
        weight = weight * scale.reshape(-1, 1, *taps)
    return weight.to(conv.weight.dtype), bias.to(conv.weight.dtype)


def _convolve(conv: _ConvNd, x: Tensor, norm: _BatchNorm | None) -> Tensor:
    weight, bias = (conv.weight, conv.bias) if norm is None else _fold(conv, norm)
    if not conv.transposed:
        return conv._conv_forward(x, weight, bias)
    transposed = _TRANSPOSED[conv.weight.dim()]
    return transposed(x, weight, bias, conv.stride, conv.padding, conv.output_padding, conv.groups, conv.dilation)  # type: ignore[arg-type]


def tune_conv_bn(conv: nn.Module, norm: nn.Module, *, freeze: bool = True) -> None:
    """Put a convolution and the batch normalisation that follows it into Tune mode, in place.

    While `norm` is in evaluation mode the convolution computes both and `norm` returns its input; in training mode both
    do what they did. Parameters, buffers and their names stay as they are.

    Args:
        conv: an nn.Conv1d to nn.Conv3d or nn.ConvTranspose1d to nn.ConvTranspose3d whose output only `norm` uses.
        norm: an nn.BatchNorm1d to nn.BatchNorm3d with running statistics.
        freeze: keep `norm` in evaluation mode even when the model is put into training mode.

    Raises:
        UsageError: if the pair is not of these types, or does not fit.

    Example:
        >>> conv, norm = nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)
        >>> x = torch.linspace(0, 1, 16).view(1, 1, 4, 4)
        >>> before = norm.eval()(conv(x))
        >>> tune_conv_bn(conv, norm)
        >>> torch.allclose(norm(conv(x)), before, atol=1e-6)
        True

    References:
        You et al. 2023, arXiv:2305.11624, section 3.
    """
    _check(conv, norm)
    conv._norm = (norm,)  # type: ignore[assignment]
    norm._frozen, norm._was_training = freeze, norm.training  # type: ignore[assignment]
    conv.__class__, norm.__class__ = _CONVS[type(conv)], _NORMS[type(norm)]
    norm.train(norm.training)


def _check(conv: nn.Module, norm: nn.Module) -> None:
    if not _fits(conv, norm):
        raise UsageError(
            f"tune mode needs a convolution and a batch normalisation of its channels with running statistics, got "
            f"{type(conv).__name__} and {type(norm).__name__}: parametrized and lazy ones are not supported."
        )


def _fits(conv: nn.Module, norm: nn.Module) -> bool:
    if type(conv) not in _CONVS or type(norm) not in _NORMS:
        return False
    return norm.running_var is not None and norm.num_features == conv.out_channels


def deploy_conv_bn(model: nn.Module) -> dict[str, str]:
    """Merge every pair in Tune mode for good: one convolution of W' and b', and nn.Identity for the normalisation.

    This is Deploy mode. The function in evaluation is the same; training it is not, as the gradients are others.

    Args:
        model: a model that "tune-mode" was applied to.

    Returns:
        What was changed, by name.

    Raises:
        UsageError: if no pair is in Tune mode.
    """
    merged: set[int] = set()
    changes: dict[str, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, _Tuned) and isinstance(module, _ConvNd):
            norm = module._norm[0]
            weight, bias = (value.detach() for value in _fold(module, norm))
            _revert(module)
            trained = module.weight.requires_grad
            module.weight = nn.Parameter(weight.clone(), requires_grad=trained)
            module.bias = nn.Parameter(bias.clone(), requires_grad=trained)
            merged.add(id(norm))
            changes[name] = "weight and bias merged with the batch normalisation's"
    if not changes:
        raise UsageError(f"deploy_conv_bn: nothing in {type(model).__name__} is in Tune mode: apply tune-mode first.")
    for name, module in list(model.named_modules()):
        for child, part in list(module._modules.items()):  # a norm may have two names
            if id(part) in merged:
                setattr(module, child, nn.Identity())
                changes[f"{name}.{child}" if name else child] = "nn.Identity: the convolution computes it"
    return changes


def _revert(conv: nn.Module) -> None:
    norm: Any = conv._norm[0]  # type: ignore[index]
    conv.__class__ = next(plain for plain, tuned in _CONVS.items() if tuned is type(conv))
    norm.__class__ = next(plain for plain, folded in _NORMS.items() if folded is type(norm))
    if norm._frozen:
        norm.training = norm._was_training and conv.training
    del conv._norm, norm._frozen, norm._was_training


def _find(model: nn.Module, prefix: str = "") -> list[tuple[str, str]]:
    """Return the names of pairs: a convolution called once whose output is used once, by a normalisation called once.

    The model is traced; where its forward depends on data, its children are traced one by one.
    """
    graph = None
    # Whatever a forward meets that torch.fx cannot follow; and what it leaves on modules would be of torch.fx's values.
    with contextlib.suppress(Exception), undisturbed(model):
        graph = fx.Tracer().trace(model)
    if graph is None:
        return [
            pair
            for name, child in model.named_children()
            if not isinstance(child, (*_CONVS, *_NORMS))
            for pair in _find(child, f"{prefix}{name}.")
        ]
    calls = [node for node in graph.nodes if node.op == "call_module"]
    times = Counter(id(model.get_submodule(str(node.target))) for node in calls)
    pairs = []
    for node in calls:
        source = node.args[0] if node.args else None
        if not isinstance(source, fx.Node) or source.op != "call_module" or len(source.users) > 1:
            continue
        names = str(source.target), str(node.target)
        conv, norm = (model.get_submodule(name) for name in names)
        once = times[id(conv)] == times[id(norm)] == 1
        if _fits(conv, norm) and once and len(source.args) == 1 and not source.kwargs:
            pairs.append((prefix + names[0], prefix + names[1]))
    return pairs


def _apply(model: nn.Module, *, freeze: bool = True, pairs: Sequence[tuple[str, str]] | None = None) -> dict[str, str]:
    """Put every pair of convolution and batch normalisation into Tune mode.

    Args:
        model: the model.
        freeze: keep the normalisations in evaluation mode even when the model is put into training mode.
        pairs: names of convolutions and the normalisations after them, where they cannot be found by tracing.
    """
    found = _find(model) if pairs is None else [(str(conv), str(norm)) for conv, norm in pairs]
    if not found:
        raise UsageError(
            f"tune-mode: no convolution directly followed by a batch normalisation was found in {type(model).__name__}."
            " Looked for calls of nn.Conv1d to nn.ConvTranspose3d and nn.BatchNorm1d to nn.BatchNorm3d by torch.fx; "
            "name them in pairs=[('conv1', 'bn1'), ...] if its forward cannot be traced."
        )
    modules = dict(model.named_modules(remove_duplicate=False))
    for conv, norm in found:
        if conv not in modules or norm not in modules:
            raise UsageError(f"tune-mode: there is no module {conv if conv not in modules else norm!r} to change.")
        _check(modules[conv], modules[norm])
    if len({id(modules[name]) for pair in found for name in pair}) < 2 * len(found):
        raise UsageError(f"tune-mode: a module is in two pairs, got {found}: give each convolution its own norm.")
    changes: dict[str, str] = {}
    for conv, norm in found:
        tune_conv_bn(modules[conv], modules[norm], freeze=freeze)
        changes[conv] = f"weight and bias folded with the frozen statistics of {norm}"
        changes[norm] = f"computed by {conv}" + (", frozen" if freeze else " while in evaluation mode")
    return changes


def _remove(model: nn.Module) -> dict[str, str]:
    """Take every pair out of Tune mode: the same function, by two modules again. `deploy_conv_bn` merges instead."""
    changes: dict[str, str] = {}
    for name, module in list(model.named_modules()):
        if isinstance(module, _Tuned):
            _revert(module)  # type: ignore[arg-type]
            changes[name] = "followed by its batch normalisation again"
    return changes


CARD = Card(
    name="tune-mode",
    room="layers",
    summary="frozen batch normalisation folded into the convolution on the fly: Eval mode's gradients, Deploy's cost",
    paper=Paper(
        "Efficient ConvBN Blocks for Transfer Learning and Beyond",
        2023,
        arxiv="2305.11624",
        code="https://github.com/thuml/efficient_conv_bn_eval",
    ),
    equation="y = conv(x; W gamma / sqrt(var + eps), beta + (b - mu) gamma / sqrt(var + eps))",
    claim=(
        "As stable as Eval mode in transfer learning, with much less memory and time: the accuracy is the same over 5 "
        "data sets and 12 architectures."
    ),
    acts_on="model",
    entry="trimtab.layers.convolution.tune_mode:tune_conv_bn",
    defaults=(Default("freeze", True, "paper: Tune mode is for batch normalisation that stays in evaluation mode"),),
    verified={
        "equation": (
            "tests/layers/convolution/test_tune_mode.py::test_equals_eval_mode",
            "tests/layers/convolution/test_tune_mode.py::test_gradient_is_closed_form",
            "tests/layers/convolution/test_tune_mode.py::test_saves_less_for_the_backward",
        ),
        "reference": ("tests/layers/convolution/test_tune_mode.py::test_equals_inductors",),
    },
    deviations=(
        "The authors replace the model's forward by a traced graph; here the modules stay, and change their class in "
        "place, so that hooks, state dicts and names are as before. Models that torch.fx cannot trace are searched "
        "child by child.",
        "Normalisations are kept in evaluation mode (freeze); the authors leave that to the training code.",
        "Transposed convolutions are folded too.",
        "Whatever replaces the normalisation afterwards, such as nn.SyncBatchNorm's conversion, normalises a second "
        "time: convert first, or remove this before.",
        "With FSDP2, a pair must be in one group of fully_shard: the convolution reads both modules' parameters.",
    ),
    experiments=(
        Experiment(
            "trimtab.studies.convolution:transfer",
            "mode=eval,lr=0.01",
            "mode=tune,lr=0.01",
            metric="saved_bytes",
            mechanism="loss",
            outcome=(
                "better: 1,590,784 to 924,864, difference -665,920 (95 % interval -665,920 to -665,920), n=5; "
                "loss 0.116 to 0.115"
            ),
        ),
        Experiment(
            "trimtab.studies.convolution:transfer",
            "mode=deploy,lr=0.03",
            "mode=tune,lr=0.01",
            outcome="no evidence: 0.0937 to 0.115, difference 0.0217 (95 % interval -0.00749 to 0.0509), n=5",
        ),
    ),
    apply=_apply,
    remove=_remove,
)
