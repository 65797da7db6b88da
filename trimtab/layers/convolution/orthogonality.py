"""L_orth: a penalty on kernels that makes convolutions orthogonal.

A kernel K [M, C, k, k] with stride S is a linear map from C to M channels of images. Its rows are orthonormal where
M <= C S^2, or its columns where M >= C S^2, exactly when

    L_orth(K) = |conv(K, K, padding=P, stride=S) - I_r0|^2 - max(M - C S^2, 0),   P = floor((k - 1) / S) S

is 0; I_r0 is the identity at the centre and 0 elsewhere. On N x N outputs with circular padding it is the squared error
of the operator's matrix, |KK^T - I|_F^2 = N^2 L_orth(K) (or K^T K), and it bounds the spectral error too, whatever N:

    |KK^T - I|_2^2 <= (2 floor((k - 1) / S) + 1)^2 M L_orth(K),     |K^T K - I|_2^2 <= (2k - 1)^2 C L_orth(K)

so that all singular values are close to 1. Achour, Malgouyres and Mamalet 2022 (arXiv:2108.05623), after Wang et al.
2020 (arXiv:1911.12207). In one and three dimensions the squares are first and third powers.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.card import Card, Default, Experiment, Paper
from trimtab.errors import UsageError

__all__ = ["orthogonal_convolution_loss", "orthogonal_convolution_penalty"]

_CONV = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}
_KINDS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def orthogonal_convolution_loss(
    kernel: Tensor, *, stride: int | Sequence[int] = 1, dilation: int | Sequence[int] = 1, groups: int = 1
) -> Tensor:
    """Return L_orth(K) = |conv(K, K, padding=P, stride=S) - I_r0|^2 - max(M - C S^2, 0).

    It costs one convolution of the kernel with itself, and does not depend on the size of images. A transposed
    convolution has the transposed operator: give its weight as it is.

    Args:
        kernel: [M, C / groups, k...], of one, two or three dimensions.
        stride: S, at least 1; one for each dimension, or one for all.
        dilation: at least 1.
        groups: the operator is made of this many blocks, whose losses add up.

    Returns:
        A scalar, in float32 or better; 0 up to rounding where the convolution is orthogonal.

    Raises:
        UsageError: if the kernel is no convolution's, or no orthogonal convolution of its shape exists: with
            M <= C S^2 there must be at most C k^2 filters, and otherwise the stride must be at most k.

    Example:
        >>> identity = torch.zeros(2, 2, 3, 3)
        >>> identity[0, 0, 1, 1] = identity[1, 1, 1, 1] = 1
        >>> float(orthogonal_convolution_loss(identity))
        0.0
        >>> float(orthogonal_convolution_loss(2 * identity))  # two filters of squared norm 4
        18.0

    References:
        Achour et al. 2022, arXiv:2108.05623, definition 4 and theorems 5 to 7; Wang et al. 2020, arXiv:1911.12207.
    """
    dims = kernel.dim() - 2
    if kernel.dim() not in _CONV or not kernel.is_floating_point():
        raise UsageError(f"kernel must be [M, C, k...] of 1 to 3 dimensions, got {kernel.dtype} {tuple(kernel.shape)}.")
    steps, spread = _each("stride", stride, dims), _each("dilation", dilation, dims)
    if groups < 1 or kernel.shape[0] % groups:
        raise UsageError(f"groups must divide the {kernel.shape[0]} filters, got {groups}.")
    m, c = kernel.shape[0] // groups, kernel.shape[1]
    area, taps = torch.Size(steps).numel(), kernel[0, 0].numel()
    if m <= c * area and m > c * taps:
        raise UsageError(
            f"no orthogonal convolution has {m} filters on {c} channels of {taps} taps: at most {c * taps} are "
            "orthogonal to each other."
        )
    if m > c * area and any(s > k for s, k in zip(steps, kernel.shape[2:], strict=True)):
        raise UsageError(
            f"no orthogonal convolution has stride {steps} above its kernel's size {tuple(kernel.shape[2:])} and more "
            f"filters ({m}) than C S^2 = {c * area}: it leaves out pixels."
        )
    with torch.autocast(kernel.device.type, enabled=False):
        wide = _dilated(kernel.to(torch.promote_types(kernel.dtype, torch.float32)), spread)
        # Filter number i of every group is one image of the batch; group g's filters meet it in their own channels.
        images = wide.unflatten(0, (groups, m)).transpose(0, 1).flatten(1, 2)
        reach = [(k - 1) // s for k, s in zip(wide.shape[2:], steps, strict=True)]
        padding = [r * s for r, s in zip(reach, steps, strict=True)]
        products = _CONV[kernel.dim()](images, wide, None, steps, padding, 1, groups)
        identity = torch.eye(m, dtype=wide.dtype, device=wide.device).repeat(1, groups)
        target = F.pad(identity.reshape(m, groups * m, *[1] * dims), [r for r in reversed(reach) for _ in range(2)])
        return (products - target).square().sum() - groups * max(m - c * area, 0)


def _each(name: str, value: int | Sequence[int], dims: int) -> tuple[int, ...]:
    values = (value,) * dims if isinstance(value, int) else tuple(value)
    if len(values) != dims or min(values) < 1:
        raise UsageError(f"{name} must be at least 1, one number or {dims}, got {value}.")
    return values


def _dilated(kernel: Tensor, dilation: tuple[int, ...]) -> Tensor:
    """Return the kernel with the zeros between its taps that a dilation stands for."""
    if all(d == 1 for d in dilation):
        return kernel
    sizes = [d * (k - 1) + 1 for d, k in zip(dilation, kernel.shape[2:], strict=True)]
    wide = kernel.new_zeros(*kernel.shape[:2], *sizes)
    taps = (slice(None), slice(None), *(slice(None, None, d) for d in dilation))
    wide[taps] = kernel
    return wide


def orthogonal_convolution_penalty(model: nn.Module, *, skip: Sequence[str] = ()) -> Tensor:
    """Return the sum of L_orth over a model's convolutions, each weight once; add it to the loss times a coefficient.

    Args:
        model: the model.
        skip: patterns (`"stem"`, `"blocks.0.*"`) of names of convolutions to leave out.

    Returns:
        A scalar with a gradient to every kernel that is trained.

    Raises:
        UsageError: if there is no convolution, or one that cannot be orthogonal, by name: leave it out with `skip`.

    Example:
        >>> torch.manual_seed(0)  # doctest: +ELLIPSIS
        <torch...>
        >>> penalty = orthogonal_convolution_penalty(nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3)))
        >>> penalty.dim(), bool(penalty > 0)
        (0, True)
    """
    patterns = (skip,) if isinstance(skip, str) else tuple(skip)
    # Kernels too, so that no id is used twice: a parametrized one is a new tensor whenever it is read.
    losses: dict[int, tuple[Tensor, Tensor]] = {}
    for name, module in model.named_modules():
        if not isinstance(module, _KINDS) or any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns):
            continue
        kernel = module.weight
        if id(kernel) in losses:
            continue
        try:
            loss = orthogonal_convolution_loss(
                kernel, stride=module.stride, dilation=module.dilation, groups=module.groups
            )
            losses[id(kernel)] = (kernel, loss)
        except UsageError as error:
            raise UsageError(f"{name or type(model).__name__}: {error} Or name the module in skip.") from error
    if not losses:
        raise UsageError(
            f"orthogonal-convolution: no convolution in {type(model).__name__}, except those in skip. Looked for "
            "nn.Conv1d to nn.Conv3d and nn.ConvTranspose1d to nn.ConvTranspose3d."
        )
    return torch.stack([loss for _, loss in losses.values()]).sum()


CARD = Card(
    name="orthogonal-convolution",
    room="layers",
    summary="a penalty on convolution kernels that is 0 exactly when the operator is orthogonal, at any image size",
    paper=Paper(
        "Existence, Stability and Scalability of Orthogonal Convolutional Neural Networks", 2022, arxiv="2108.05623"
    ),
    equation="L_orth(K) = |conv(K, K, padding=P, stride=S) - I_r0|^2 - max(M - C S^2, 0), P = floor((k-1)/S) S",
    claim=(
        "A small penalty guarantees convolutions close to isometries, even on large images; their coefficient tunes a "
        "trade-off of accuracy and orthogonality, for the benefit of accuracy and robustness."
    ),
    acts_on="loss",
    entry="trimtab.layers.convolution.orthogonality:orthogonal_convolution_penalty",
    treats={"vanishing-gradient": 4, "exploding-gradient": 5},
    defaults=(Default("skip", (), "paper: every convolution"),),
    verified={
        "equation": (
            "tests/layers/convolution/test_orthogonality.py::test_is_the_error_of_the_explicit_operator",
            "tests/layers/convolution/test_orthogonality.py::test_bounds_the_spectral_error",
            "tests/layers/convolution/test_orthogonality.py::test_zero_exactly_for_orthogonal_operators",
        ),
    },
    deviations=(
        "The theorems are for circular padding and square kernels; the loss of a layer with zeros or valid padding "
        "is that of the circular operator, as in the paper's experiments. One and three dimensions, unequal strides "
        "and kernels, groups and dilation follow the same definition.",
        "Wang et al. add the loss without the constant M - C S^2 and take its square root in their code; here it is "
        "the paper's, whose minimum is 0.",
    ),
    experiments=(
        Experiment(
            "trimtab.studies.convolution:orthogonal",
            "penalty=0",
            "penalty=1",
            metric="gradient_drift",
            mechanism="singular_deviation",
            outcome=(
                "better: 0.765 to 0.174, difference -0.592 (95 % interval -0.717 to -0.466), n=5; singular "
                "deviation 0.504 to 0.0727"
            ),
        ),
        Experiment(
            "trimtab.studies.convolution:orthogonal",
            "penalty=0",
            "penalty=1",
            metric="accuracy",
            higher_is_better=True,
            outcome="no evidence: 0.902 to 0.925, difference 0.0227 (95 % interval -0.0212 to 0.0666), n=5",
        ),
    ),
)
