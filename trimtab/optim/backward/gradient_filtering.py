"""Gradient filtering: a convolution whose backward sees the output gradient averaged over patches of r x r pixels.

With one value a patch, the sums over pixels and over kernel positions in the backward pass come apart, so that both
gradients need only the input summed over patches and the kernel summed over its positions:

    gy~ = mean of gy over each r x r patch,   x~ = sum of x over the (r s) x (r s) patch,   W~ = sum_k W[o, c, k]
    gW[o, c, k] = 1 / s^2 sum_p gy~[o, p] x~[c, p] for every k,   gx[c, pixels of p] = 1 / s^2 sum_o W~[o, c] gy~[o, p]

s is the stride. The forward pass is exact; only x~, about (r s)^2 times smaller than x, is kept for the backward, whose
multiplications fall by K^2 r^2 for a K x K kernel. Yang, Li, Marculescu 2023 (arXiv:2301.00330); authors' code
SLDGroup/GradientFilter-CVPR23 at 92fc1f4, classification/custom_op/conv_avg.py.

Shape suffixes: B batch, C input channels, O output channels, G groups, H and W pixels, P and Q patches.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from trimtab.card import Card, Default, Paper
from trimtab.errors import UsageError, choose

__all__ = ["GradientFilteredConv2d", "filtered_conv2d", "gradient_filter", "remove_gradient_filter"]

_FOLLOW = ("paper", "code")


class _FilteredConv2d(torch.autograd.Function):
    """The convolution itself, with the pooled backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, options: tuple) -> Tensor:
        stride, padding, dilation, groups, r, follow = options
        y = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
        patches = [math.ceil(size / r) for size in y.shape[-2:]]
        kernel = [r * s for s in stride]
        spare = [p * k - size for p, k, size in zip(patches, kernel, x.shape[-2:], strict=True)]
        before = [math.ceil(n / 2) for n in spare]
        x_sum = weight_sum = None
        if ctx.needs_input_grad[1]:
            padded = F.pad(x, (before[1], spare[1] - before[1], before[0], spare[0] - before[0])) if any(spare) else x
            x_sum = F.avg_pool2d(padded, kernel, divisor_override=1)
        if ctx.needs_input_grad[0]:
            weight_sum = weight.sum(dim=(-2, -1))
        ctx.save_for_backward(x_sum, weight_sum)
        ctx.geometry = (x.shape, weight.shape, kernel, before, groups, r)
        # Each output meets 1 / s^2 of the pixels of its patch at any one kernel position.
        ctx.share = 1.0 if follow == "code" else 1.0 / (stride[0] * stride[1])
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        x_sum, weight_sum = ctx.saved_tensors
        x_shape, weight_shape, kernel, before, G, r = ctx.geometry
        B = len(gy)
        spare = [-size % r for size in gy.shape[-2:]]
        gy_mean = F.avg_pool2d(gy, r, padding=[math.ceil(n / 2) for n in spare], count_include_pad=False)
        P, Q = gy_mean.shape[-2:]
        # Under autocast the output is narrower than the input or the weight.
        saved = x_sum if x_sum is not None else weight_sum
        gy_BGOP = gy_mean.reshape(B, G, -1, P * Q).to(gy.dtype if saved is None else saved.dtype)
        gx = gw = gb = None
        if ctx.needs_input_grad[0]:
            w_GOC = weight_sum.reshape(G, gy_BGOP.shape[2], -1).to(gy_BGOP.dtype) * ctx.share
            gx = torch.einsum("bgop,goc->bgcp", gy_BGOP, w_GOC).reshape(B, -1, P, Q)
            # Columns before rows: the other order is twelve times slower.
            gx = gx.repeat_interleave(kernel[1], dim=-1).repeat_interleave(kernel[0], dim=-2)
            (top, left), (height, width) = before, x_shape[-2:]
            gx = gx[..., top : top + height, left : left + width]
        if ctx.needs_input_grad[1]:
            x_BGCP = x_sum.reshape(B, G, -1, P * Q) * ctx.share
            gw = torch.einsum("bgop,bgcp->goc", gy_BGOP, x_BGCP).reshape(weight_shape[:2])
            gw = gw[..., None, None].expand(weight_shape)
        if ctx.needs_input_grad[2]:
            gb = gy.sum(dim=(0, 2, 3))
        return gx, gw, gb, None


def filtered_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    patch_size: int = 4,
    stride: int | tuple[int, int] = 1,
    padding: str | int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    follow: str = "paper",
) -> Tensor:
    """Return the exact 2-D convolution of x, with the gradients of gradient filtering.

    gW[o, c, k] = 1 / s^2 sum_p gy~[o, p] x~[c, p], gx[c, p] = 1 / s^2 sum_o W~[o, c] gy~[o, p]; gb = sum gy is exact.

    Args:
        x: [B, C, H, W] or [C, H, W].
        weight: [O, C / groups, K, K].
        bias: [O].
        patch_size: r >= 1, the side of the patches in output pixels.
        stride: as in `torch.nn.functional.conv2d`.
        padding: the same; the patches must cover the input, which takes 2 padding >= dilation (K - 1).
        dilation: the same; below `patch_size`, or 1.
        groups: the same.
        follow: `"paper"`, or `"code"` to leave out the factor 1 / s^2, as the authors' code does.

    Returns:
        [B, O, H', W'], as `torch.nn.functional.conv2d`.

    Raises:
        UsageError: if an option breaks its rule.

    Example:
        >>> x, weight = torch.ones(1, 1, 4, 4), torch.ones(1, 1, 3, 3, requires_grad=True)
        >>> filtered_conv2d(x, weight, patch_size=2, padding=1).sum().backward()
        >>> weight.grad[0, 0, 0]  # every position: the sum of x; the exact gradient is 9, 12, 9
        tensor([16., 16., 16.])

    References:
        Yang, Li, Marculescu 2023, arXiv:2301.00330; custom_op/conv_avg.py of the authors' code.
    """
    if x.dim() not in (3, 4):
        raise UsageError(f"filtered_conv2d needs [B, C, H, W] or [C, H, W], got shape {tuple(x.shape)}.")
    stride, dilation = _pair(stride), _pair(dilation)
    kernel = (weight.shape[-2], weight.shape[-1])
    if problem := _problem(kernel, padding, dilation, patch_size):
        raise UsageError(problem)
    choose("follow", follow, _FOLLOW)
    if not isinstance(padding, str):
        padding = _pair(padding)
    y = _FilteredConv2d.apply(
        x if x.dim() == 4 else x.unsqueeze(0), weight, bias, (stride, padding, dilation, groups, patch_size, follow)
    )
    return y if x.dim() == 4 else y.squeeze(0)


class GradientFilteredConv2d(nn.Conv2d):
    """A `torch.nn.Conv2d` whose backward is filtered: what `gradient_filter` turns convolutions into.

    gW[o, c, k] = 1 / s^2 sum_p gy~[o, p] x~[c, p], gx[c, p] = 1 / s^2 sum_o W~[o, c] gy~[o, p].

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1))
        >>> _ = gradient_filter(model, patch_size=2)
        >>> type(model[0]).__name__, model[0].patch_size
        ('GradientFilteredConv2d', 2)

    References:
        Yang, Li, Marculescu 2023, arXiv:2301.00330.
    """

    patch_size: int = 4
    follow: str = "paper"

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return filtered_conv2d(
            input,
            weight,
            bias,
            patch_size=self.patch_size,
            stride=self.stride,  # type: ignore[arg-type]
            padding=self.padding,  # type: ignore[arg-type]
            dilation=self.dilation,  # type: ignore[arg-type]
            groups=self.groups,
            follow=self.follow,
        )


def gradient_filter(
    model: nn.Module,
    *,
    patch_size: int = 4,
    only: Sequence[str] = ("*",),
    skip: Sequence[str] = (),
    follow: str = "paper",
) -> dict[str, str]:
    """Filter the backward pass of a model's 2-D convolutions, in place; the function it computes stays the same.

    gW[o, c, k] = 1 / s^2 sum_p gy~[o, p] x~[c, p], gx[c, p] = 1 / s^2 sum_o W~[o, c] gy~[o, p].

    Convolutions that the method does not fit are left as they are: those without zero padding of at least
    dilation (K - 1) / 2, those with a dilation from `patch_size` on, and subclasses of `torch.nn.Conv2d`.

    Args:
        model: the model; its convolutions keep their parameters and their names.
        patch_size: r >= 1; the paper's experiments use 2 and 4, and more where maps are large.
        only: patterns (`"layer4.*"`) of names of modules to change; the paper fine-tunes and filters the last few.
        skip: patterns of names of modules to leave as they are.
        follow: `"paper"`, or `"code"` to leave out the factor 1 / s^2 for stride s.

    Returns:
        What was changed, `{module: what}`.

    Raises:
        UsageError: if an option breaks its rule, or no convolution can be changed.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3))
        >>> gradient_filter(model, patch_size=2)
        {'0': 'backward over 2 x 2 patches'}

    References:
        Yang, Li, Marculescu 2023, arXiv:2301.00330; custom_op/register.py of the authors' code.
    """
    choose("follow", follow, _FOLLOW)
    if problem := _problem((1, 1), 0, (1, 1), patch_size):
        raise UsageError(problem)
    only, skip = ((patterns,) if isinstance(patterns, str) else tuple(patterns) for patterns in (only, skip))
    changes: dict[str, str] = {}
    reasons: list[str] = []
    for name, module in model.named_modules():
        if type(module) is not nn.Conv2d or _matches(name, skip) or not _matches(name, only):
            continue
        problem = _problem(module.kernel_size, module.padding, module.dilation, patch_size)
        if module.padding_mode != "zeros":
            problem = f"gradient filtering needs zero padding, got padding_mode {module.padding_mode!r}."
        if problem:
            reasons.append(f" {name or 'It'}: {problem}")
            continue
        # The class, not the module: hooks, parameters and references to the module stay what they are.
        module.__class__ = GradientFilteredConv2d
        module.patch_size, module.follow = patch_size, follow  # type: ignore[assignment]
        changes[name] = f"backward over {patch_size} x {patch_size} patches"
    if not changes:
        why = "".join(reasons[:1]) or " Looked for torch.nn.Conv2d."
        raise UsageError(f"gradient-filter: no convolution to change in {type(model).__name__}.{why}")
    return changes


def remove_gradient_filter(model: nn.Module) -> dict[str, str]:
    """Give a model's convolutions their exact backward pass again: gW = x * gy, gx = W^T * gy.

    Args:
        model: the model, changed in place.

    Returns:
        What was changed, `{module: what}`; empty if nothing was filtered.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1))
        >>> _ = gradient_filter(model)
        >>> remove_gradient_filter(model)
        {'0': 'exact backward'}
        >>> type(model[0]).__name__
        'Conv2d'

    References:
        Yang, Li, Marculescu 2023, arXiv:2301.00330.
    """
    changes = {}
    for name, module in model.named_modules():
        if type(module) is GradientFilteredConv2d:
            module.__class__ = nn.Conv2d  # type: ignore[assignment]
            del module.patch_size, module.follow
            changes[name] = "exact backward"
    return changes


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _problem(kernel: Any, padding: Any, dilation: Any, patch_size: int) -> str:
    """Return why a convolution cannot be filtered, or nothing."""
    if isinstance(patch_size, bool) or not isinstance(patch_size, int) or patch_size < 1:
        return f"patch_size must be a whole number from 1 on, got {patch_size!r}: the paper uses 2 and 4."
    if max(dilation) > 1 and max(dilation) >= patch_size:
        return f"gradient filtering needs a dilation below patch_size {patch_size}, got {tuple(dilation)}."
    reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    pads = [math.inf] * 2 if padding == "same" else [0, 0] if padding == "valid" else _pair(padding)
    if any(2 * pad < n for pad, n in zip(pads, reach, strict=True)):
        return (
            f"gradient filtering needs padding of at least dilation (K - 1) / 2, so that the patches cover the input: "
            f"got padding {padding!r} with kernel {tuple(kernel)} and dilation {tuple(dilation)}."
        )
    return ""


CARD = Card(
    name="gradient-filter",
    room="optim",
    summary="convolutions whose backward pass works on pooled maps, at a fraction of its memory and multiplications",
    paper=Paper(
        "Efficient On-device Training via Gradient Filtering",
        2023,
        arxiv="2301.00330",
        code="https://github.com/SLDGroup/GradientFilter-CVPR23",
    ),
    equation=(
        "gy~ = mean of gy over r x r patches, x~ = patch sums of x, W~ = sum_k W; "
        "gW[o,c,k] = 1/s^2 sum_p gy~[o,p] x~[c,p], gx[c,p] = 1/s^2 sum_o W~[o,c] gy~[o,p]"
    ),
    claim="Up to 19x faster with 77.1 % less memory on ImageNet classification, at 0.1 % accuracy loss.",
    acts_on="optimizer",
    entry="trimtab.optim.backward.gradient_filtering:gradient_filter",
    defaults=(
        Default("patch_size", 4, "authors' code, Conv2dAvg (order=4); its configuration files set it layer by layer"),
        Default("only", ("*",), "ours; the paper filters the layers that it fine-tunes, the last few"),
        Default("skip", (), "ours"),
        Default("follow", "paper", "ours: the same formulas, with the stride taken into account"),
    ),
    verified={
        "equation": (
            "tests/optim/backward/test_gradient_filtering.py::test_equals_plain_loops",
            "tests/optim/backward/test_gradient_filtering.py::test_is_exact_where_the_assumption_holds",
        ),
        "claim": (
            "tests/optim/backward/test_gradient_filtering.py::test_saved_bytes_and_multiplications_fall_as_predicted",
            "tests/optim/backward/test_gradient_filtering.py::test_points_along_the_exact_gradient",
        ),
    },
    deviations=(
        "With stride s, the authors' code sums all (r s)^2 input pixels of a patch though each kernel position meets "
        "r^2 of them, so that both gradients come out s^2 times too large (4 times for stride 2, on constant maps "
        "exactly); follow='paper' divides by s^2, follow='code' does not.",
        "Groups may be any number; the authors' code handles 1 and depthwise convolutions.",
        "The authors' second operator, for a dilation from r on, is not here: such convolutions keep their exact "
        "backward pass.",
        "The authors' code fails with a shape error where the patches do not cover the input (less padding than "
        "'same'); here such a convolution is refused or, in a model, left as it is.",
    ),
)
