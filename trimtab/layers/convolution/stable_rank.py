"""SRN-C: set the spectral norm of a convolution and bound its stable rank, both of the operator on images.

A recurrent network of convolutions is a dynamical system: where its operators amplify, some input makes it diverge.
With T the operator of a kernel K on circular images (T v = conv(v; K)), u and v its first singular vectors by power
iteration with convolutions, and G = d sigma / dK = d <u, T v> / dK, so that sigma = <G, K>:

    K1 = sigma G / |G|^2,   K2 = K - K1  (orthogonal to G: shrinking it leaves <u, T v> as it is)
    K' = K1 + gamma K2,     gamma = min(1, sqrt((beta m sigma^2 - |K1|^2) / |K2|^2))
    K" = alpha K' / sigma(K')

The operator's spectral norm is then alpha and its stable rank |T|_F^2 / |T|^2 at most a share beta of its largest
possible rank; m = min(M, C S^d) is that rank for each output position. beta = 1 is spectral normalisation of the
operator. Tanay et al. 2020 (arXiv:2010.05099); for matrices, where G = u v^T, this is Stable Rank Normalization of
Sanyal, Torr and Dokania 2020 (arXiv:1906.04659).
"""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv1d_weight, conv2d_weight, conv3d_weight
from torch.nn.utils import parametrize

from trimtab.card import Card, Default, Experiment, Paper
from trimtab.errors import UsageError
from trimtab.layers._checkpointing import recomputing
from trimtab.scalars import to_scalar

__all__ = ["StableRankNorm"]

_KINDS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_CONV = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}
_TRANSPOSED = {3: F.conv_transpose1d, 4: F.conv_transpose2d, 5: F.conv_transpose3d}
_TO_KERNEL = {3: conv1d_weight, 4: conv2d_weight, 5: conv3d_weight}
_CONVERGED, _CHECK_EVERY, _MOST_ITERATIONS = 1e-6, 20, 1000


class StableRankNorm(nn.Module):
    """Parametrization of a convolution's weight, for `torch.nn.utils.parametrize.register_parametrization`.

    Power iteration starts from a fixed image and is carried on until sigma has converged; each training forward then
    takes one more iteration, and evaluation none. It runs in float32 or better, under autocast too.

    Args:
        conv: the nn.Conv1d to nn.Conv3d whose weight it is for.
        alpha: spectral norm of the operator, above 0.
        beta: upper bound of the stable rank, as a share of the largest rank, in (0, 1]; 1 leaves it as it is.
        size: side of the images of outputs that the operator is taken on.

    Raises:
        UsageError: if an argument breaks its rule, or the weight is zero, not finite, sharded or on the meta device.

    Example:
        >>> conv = nn.Conv2d(1, 1, 1)
        >>> _ = parametrize.register_parametrization(conv, "weight", StableRankNorm(conv, alpha=0.5))
        >>> round(abs(float(conv.weight.detach())), 4)
        0.5

    References:
        Tanay et al. 2020, arXiv:2010.05099, section 5; Sanyal et al. 2020, arXiv:1906.04659, algorithm 1.
    """

    image: Tensor
    slope: Tensor
    shrunk_image: Tensor
    shrunk_slope: Tensor

    def __init__(self, conv: nn.Module, *, alpha: float = 1.0, beta: float = 1.0, size: int = 16) -> None:
        super().__init__()
        if not isinstance(conv, _KINDS):
            raise UsageError(f"stable-rank-norm needs an nn.Conv1d to nn.Conv3d, got {type(conv).__name__}.")
        if not alpha > 0:
            raise UsageError(f"alpha must be above 0, got {alpha}: 1 makes the operator's spectral norm 1.")
        if not 0 < beta <= 1:
            raise UsageError(f"beta must be above 0 and at most 1, got {beta}: it is a share of the largest rank.")
        weight = conv.weight.detach()
        if weight.is_meta or hasattr(weight, "full_tensor"):
            what = "on the meta device" if weight.is_meta else "sharded"
            raise UsageError(f"stable-rank-norm needs the weight's values, but it is {what}: apply it before that.")
        self.alpha, self.beta = alpha, beta
        self.stride, self.dilation, self.groups = conv.stride, conv.dilation, conv.groups
        self.reach = tuple(d * (k - 1) for d, k in zip(conv.dilation, weight.shape[2:], strict=True))
        self.sides = tuple(s * size for s in conv.stride)
        if size < 1 or any(r >= side for r, side in zip(self.reach, self.sides, strict=True)):
            raise UsageError(f"size must be at least that of the kernel, {tuple(weight.shape[2:])}, got {size}.")
        area = torch.Size(conv.stride).numel()
        self.rank = min(conv.out_channels, conv.in_channels * area)
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        generator = torch.Generator().manual_seed(0)
        start = torch.randn(1, conv.in_channels, *self.sides, generator=generator, dtype=torch.float64).to(wide)
        image, slope = self._converge(wide, start)
        if not 0 < to_scalar((slope * wide).sum()) < float("inf"):
            raise UsageError("stable-rank-norm needs a weight that is finite and not zero.")
        shrunk_image, shrunk_slope = self._converge(self._shrink(wide, slope), image)
        for name, value in (
            ("image", image),
            ("slope", slope),
            ("shrunk_image", shrunk_image),
            ("shrunk_slope", shrunk_slope),
        ):
            self.register_buffer(name, value.to(weight.dtype))

    def _around(self, v: Tensor) -> Tensor:
        return F.pad(v, [part for r in reversed(self.reach) for part in (0, r)], mode="circular")

    def _iterate(self, kernel: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return v = T^T u / |T^T u| for u = T v / |T v|, and G = d <u, T v> / dK."""
        dims = kernel.dim()
        u = _unit(_CONV[dims](self._around(v), kernel, None, self.stride, 0, self.dilation, self.groups))
        back = _TRANSPOSED[dims](u, kernel, None, self.stride, 0, 0, self.groups, self.dilation)
        spare = [2 * side - n for side, n in zip(self.sides, back.shape[2:], strict=True)]
        back = F.pad(back, [part for n in reversed(spare) for part in (0, n)])
        for dim, side in enumerate(self.sides, 2):
            back = back.unflatten(dim, (2, side)).sum(dim)
        v = _unit(back)
        slope = _TO_KERNEL[dims](self._around(v), kernel.shape, u, self.stride, 0, self.dilation, self.groups)
        return v, slope

    def _converge(self, kernel: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        sigma = kernel.new_zeros(())
        slope = torch.zeros_like(kernel)
        for step in range(_MOST_ITERATIONS):
            v, slope = self._iterate(kernel, v)
            if step % _CHECK_EVERY == _CHECK_EVERY - 1:
                previous, sigma = sigma, (slope * kernel).sum()
                # "not above" rather than "below": a zero or non-finite weight gives NaN, and must end the loop as well.
                if not to_scalar((sigma - previous).abs() / sigma) > _CONVERGED:
                    break
        return v, slope

    def _shrink(self, kernel: Tensor, slope: Tensor) -> Tensor:
        """Return K' = K1 + gamma K2."""
        if self.beta == 1:
            return kernel
        sigma, length = (slope * kernel).sum(), slope.square().sum()
        first = sigma / length * slope
        second = kernel - first
        room = (self.beta * self.rank - 1 / length) * sigma.square()
        # Both bounds before the root, whose slope at 0 is infinite.
        tiny = torch.finfo(kernel.dtype).tiny
        gamma = (room / second.square().sum().clamp(min=tiny)).clamp(min=1e-12, max=1.0).sqrt()
        return first + gamma * second

    def forward(self, weight: Tensor) -> Tensor:
        """Return K" in the weight's dtype."""
        with torch.autocast(weight.device.type, enabled=False):
            kernel = weight.to(torch.promote_types(weight.dtype, torch.float32))
            with torch.no_grad():
                if self.training and not recomputing():
                    image, slope = self._iterate(kernel, self.image.to(kernel.dtype))
                    shrunk = self._shrink(kernel, slope)
                    shrunk_image, shrunk_slope = self._iterate(shrunk, self.shrunk_image.to(kernel.dtype))
                    self.image.copy_(image)
                    self.slope.copy_(slope)
                    self.shrunk_image.copy_(shrunk_image)
                    self.shrunk_slope.copy_(shrunk_slope)
                # New tensors, as the next forward changes the buffers while this one may still wait for its backward.
                slope, shrunk_slope = (part.to(kernel.dtype, copy=True) for part in (self.slope, self.shrunk_slope))
            shrunk = self._shrink(kernel, slope)
            return (self.alpha / (shrunk_slope * shrunk).sum() * shrunk).to(weight.dtype)

    def extra_repr(self) -> str:
        """Return the arguments."""
        return f"alpha={self.alpha}, beta={self.beta}, sides={self.sides}"


def _unit(image: Tensor) -> Tensor:
    return image / torch.linalg.vector_norm(image)


def _apply(
    model: nn.Module, *, alpha: float = 1.0, beta: float = 1.0, size: int = 16, skip: Sequence[str] = ()
) -> dict[str, str]:
    """Normalise the operator of every convolution; options as those of `StableRankNorm`.

    A weight that two modules share is left as it is: parametrized, only one of the two would change.

    Args:
        model: the model.
        alpha: spectral norm of each operator.
        beta: upper bound of each stable rank, as a share of the largest rank.
        size: side of the images of outputs that the operators are taken on.
        skip: patterns (`"head"`, `"blocks.0.*"`) of names of modules to leave as they are.
    """
    patterns = (skip,) if isinstance(skip, str) else tuple(skip)
    owners = Counter(id(part._parameters.get("weight")) for part in model.modules() if isinstance(part, _KINDS))
    found: dict[str, tuple[nn.Module, StableRankNorm]] = {}
    for name, module in model.named_modules():
        if not isinstance(module, _KINDS) or any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns):
            continue
        weight = module._parameters.get("weight")
        if weight is None or owners[id(weight)] > 1:
            continue
        try:
            found[name] = (module, StableRankNorm(module, alpha=alpha, beta=beta, size=size))
        except UsageError as error:
            raise UsageError(f"{name or type(model).__name__}: {error} Or name the module in skip.") from error
    if not found:
        raise UsageError(
            f"stable-rank-norm: no convolution to change in {type(model).__name__}. Looked for nn.Conv1d to nn.Conv3d "
            "with a weight of their own that is not parametrized already."
        )
    for module, norm in found.values():
        norm.train(module.training)
        parametrize.register_parametrization(module, "weight", norm)
    bound = "" if beta == 1 else f", stable rank at most {beta:g} of the largest"
    return dict.fromkeys(found, f"operator's spectral norm = {alpha:g}{bound}")


def _remove(model: nn.Module) -> dict[str, str]:
    """Merge every normalised weight into a plain one: the model computes the same function."""
    changes: dict[str, str] = {}
    for name, module in list(model.named_modules()):
        for parts in list(getattr(module, "parametrizations", {}).values()):
            if not any(isinstance(part, StableRankNorm) for part in parts):
                continue
            if len(parts) > 1:
                raise UsageError(f"stable-rank-norm: {name}.weight has other parametrizations too: remove those first.")
            parts.eval()  # reading the weight must not take one more iteration
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
            changes[name] = "weight merged"
    return changes


CARD = Card(
    name="stable-rank-norm",
    room="layers",
    summary="a convolution operator's spectral norm set to alpha, its stable rank held below a share beta",
    paper=Paper("Diagnosing and Preventing Instabilities in Recurrent Video Processing", 2020, arxiv="2010.05099"),
    equation="K\" = alpha K' / sigma(K'), K' = K1 + gamma K2, K1 = sigma G / |G|^2, G = d sigma / dK",
    claim="Recurrent video models become stable on long sequences without a significant loss of quality.",
    acts_on="model",
    entry="trimtab.layers.convolution.stable_rank:StableRankNorm",
    treats={"exploding-gradient": 6},
    defaults=(
        Default("alpha", 1.0, "paper: the hard constraint (recalled)"),
        Default("beta", 1.0, "paper: the hard constraint; the soft one has alpha above and beta below 1 (recalled)"),
        Default("size", 16, "ours"),
        Default("skip", (), "paper: every convolution (recalled)"),
        Default("iterations per training forward", 1, "Miyato et al. 2018, as in both papers"),
    ),
    verified={
        "equation": (
            "tests/layers/convolution/test_stable_rank.py::test_spectral_norm_of_the_operator_is_alpha",
            "tests/layers/convolution/test_stable_rank.py::test_stable_rank_of_the_operator_is_bounded",
            "tests/layers/convolution/test_stable_rank.py::test_equals_stable_rank_normalization_of_matrices",
        ),
    },
    deviations=(
        "The paper's algorithm is recalled, not read. The rank-one part u v^T of Stable Rank Normalization is no "
        "convolution; here its place has the projection of K on G = d sigma / dK, which is u v^T for 1 x 1 kernels on "
        "one pixel and leaves <u, T v> unchanged in every case.",
        "The spectral norm of K' may lie above sigma(K), as K' has other singular vectors: it is found by its own "
        "power iteration, and the stable rank is then below the bound, not at it.",
        "The operator is that on circular images of one size. Zero padding has a spectral norm at most that of "
        "circular padding on large images, so the bound holds there up to the grid's resolution.",
        "A bound beta below what K1 alone has (gamma = 0) is not reached.",
        "One iteration a forward finds sigma late where the largest singular values are close, as they are at "
        "neighbouring frequencies: training leaves the operator's norm some 5 % above alpha.",
    ),
    experiments=(
        Experiment(
            "trimtab.studies.convolution:recurrent",
            "alpha=0,lr=0.01",
            "alpha=1,lr=0.01",
            metric="growth",
            mechanism="spectral_norm",
            outcome=(
                "no evidence: 0.22 to 0.215, difference -0.0045 (95 % interval -0.046 to 0.037), n=5; spectral "
                "norm 2.98 to 1.05"
            ),
        ),
    ),
    apply=_apply,
    remove=_remove,
)
