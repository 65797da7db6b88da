"""MS-SSIM as a training loss of images: structure at several scales, in place of squared differences of pixels.

    cs = (2 sigma_xy + C2) / (sigma_x^2 + sigma_y^2 + C2),   l = (2 mu_x mu_y + C1) / (mu_x^2 + mu_y^2 + C1)
    MS-SSIM = mean(l cs)_M^w_M  prod_{j < M} mean(cs)_j^w_j,      loss = 1 - MS-SSIM

Means, variances and covariance are those under a Gaussian window at each place where it fits; from each scale j to the
next the image is halved by averaging. C1 = (0.01 R)^2 and C2 = (0.03 R)^2 for images with range R. Wang, Simoncelli and
Bovik 2003 (doi:10.1109/ACSSC.2003.1292216); as a loss Snell et al. 2017 (arXiv:1511.06409). With one scale it is SSIM
(Wang et al. 2004, doi:10.1109/TIP.2003.819861).

Shape suffixes: B images, C channels, H height, W width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from trimtab.card import Card, Default, Experiment, Paper
from trimtab.errors import UsageError
from trimtab.losses._reduction import reduce
from trimtab.losses.preference._pairs import check_number

__all__ = ["ms_ssim", "ms_ssim_loss"]

_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
_FLOOR = 1e-6  # of each scale's mean: at 0, one scale would take the gradient of all others


def _checked(x: Tensor, y: Tensor, weights: Sequence[float], window: int, sigma: float) -> None:
    check_number("sigma", sigma, 0, open_low=True)
    if not isinstance(window, int) or isinstance(window, bool) or window < 1 or window % 2 == 0:
        raise UsageError(f"window must be an odd whole number of pixels, got {window!r}: the paper's is 11.")
    if not weights or any(not weight >= 0 for weight in weights):
        raise UsageError(f"weights must be one number of at least 0 for each scale, got {weights!r}.")
    if x.dim() != 4 or x.shape != y.shape or not x.is_floating_point() or not y.is_floating_point():
        raise UsageError(
            f"images must be floating point [B, C, H, W] of one shape, got {x.dtype} {tuple(x.shape)} and {y.dtype} "
            f"{tuple(y.shape)}."
        )
    least = (window - 1) * 2 ** (len(weights) - 1) + 1
    if min(x.shape[2:]) < least:
        raise UsageError(
            f"images must be at least {least} pixels wide and high for {len(weights)} scales with a window of {window}"
            f", got {tuple(x.shape[2:])}: give fewer weights or a smaller window."
        )


def _blurred(image: Tensor, kernel: Tensor) -> Tensor:
    """Return means under a separable window, where it fits."""
    channels = image.shape[1]
    across = F.conv2d(image, kernel.view(1, 1, 1, -1).expand(channels, 1, 1, -1), groups=channels)
    return F.conv2d(across, kernel.view(1, 1, -1, 1).expand(channels, 1, -1, 1), groups=channels)


def ms_ssim(
    x: Tensor,
    y: Tensor,
    *,
    data_range: float = 1.0,
    weights: Sequence[float] = _WEIGHTS,
    window: int = 11,
    sigma: float = 1.5,
    k1: float = 0.01,
    k2: float = 0.03,
) -> Tensor:
    """Return the multi-scale structural similarity of images.

    Args:
        x: [B, C, H, W].
        y: [B, C, H, W]; the two can change places.
        data_range: R, the largest less the smallest value that a pixel can have, above 0.
        weights: w, one for each scale, the finest first; `(1.0,)` is SSIM. Five scales need 161 pixels.
        window: pixels of the Gaussian window, odd.
        sigma: its standard deviation in pixels, above 0.
        k1: C1 = (k1 R)^2, above 0.
        k2: C2 = (k2 R)^2, above 0.

    Returns:
        At most 1, which equal images have, [B]; the mean over channels. In float32 or better, under autocast too.

    Raises:
        UsageError: if an argument breaks its rule, or the images are too small for the scales.

    Example:
        >>> image = torch.linspace(0, 1, 256).view(1, 1, 16, 16)
        >>> ms_ssim(image, image, weights=(1.0,))
        tensor([1.])

    References:
        Wang et al. 2003, doi:10.1109/ACSSC.2003.1292216.
    """
    _checked(x, y, weights, window, sigma)
    check_number("data_range", data_range, 0, open_low=True)
    c1 = (check_number("k1", k1, 0, open_low=True) * data_range) ** 2
    c2 = (check_number("k2", k2, 0, open_low=True) * data_range) ** 2
    dtype = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
    places = torch.arange(window, device=x.device, dtype=dtype) - window // 2
    kernel = torch.exp(-(places**2) / (2 * sigma**2))
    kernel = kernel / kernel.sum()
    total: Tensor | None = None
    # Variances are small differences of large means: half precision would lose them.
    with torch.autocast(x.device.type, enabled=False):
        x, y = x.to(dtype), y.to(dtype)
        for scale, weight in enumerate(weights):
            if scale:
                odd = (0, x.shape[3] % 2, 0, x.shape[2] % 2)
                x, y = (F.avg_pool2d(F.pad(image, odd, mode="replicate"), 2) for image in (x, y))
            mu_x, mu_y = _blurred(x, kernel), _blurred(y, kernel)
            var_x, var_y = _blurred(x * x, kernel) - mu_x**2, _blurred(y * y, kernel) - mu_y**2
            covariance = _blurred(x * y, kernel) - mu_x * mu_y
            similarity = (2 * covariance + c2) / (var_x + var_y + c2)
            if scale == len(weights) - 1:
                similarity = similarity * (2 * mu_x * mu_y + c1) / (mu_x**2 + mu_y**2 + c1)
            mean_BC = similarity.mean((2, 3))
            # With one scale of weight 1 nothing is raised to a power, and negative similarity stays as it is.
            factor = mean_BC if weight == 1 and len(weights) == 1 else mean_BC.clamp(min=_FLOOR) ** weight
            total = factor if total is None else total * factor
    return total.mean(1) if total is not None else x.new_ones(x.shape[0])


def ms_ssim_loss(
    x: Tensor,
    y: Tensor,
    *,
    data_range: float = 1.0,
    weights: Sequence[float] = _WEIGHTS,
    window: int = 11,
    sigma: float = 1.5,
    k1: float = 0.01,
    k2: float = 0.03,
    reduction: str = "mean",
    denominator: float | Tensor | None = None,
) -> Tensor:
    """Return 1 - MS-SSIM of images and what a model makes of them.

    Args:
        x: [B, C, H, W].
        y: [B, C, H, W].
        data_range: R, above 0: 1 for pixels in [0, 1], 2 for [-1, 1], 255 for bytes.
        weights: one for each scale, the finest first; `(1.0,)` is SSIM. Images of 32 pixels have room for two scales
            with a window of 11, or three with one of 7.
        window: pixels of the Gaussian window, odd.
        sigma: its standard deviation in pixels, above 0.
        k1: of C1, above 0.
        k2: of C2, above 0.
        reduction: `"mean"` over images, `"sum"` or `"none"`.
        denominator: what the mean divides by in place of the number of images.

    Returns:
        A scalar, or [B] with reduction `"none"`, in float32 or better. 0 for no images.

    Raises:
        UsageError: if an argument breaks its rule.

    Example:
        >>> image = torch.linspace(0, 1, 256).view(1, 1, 16, 16)
        >>> round(float(ms_ssim_loss(image, 1 - image, weights=(1.0,))), 3)  # turned around
        1.826

    References:
        Snell et al. 2017, arXiv:1511.06409.
    """
    values = ms_ssim(x, y, data_range=data_range, weights=weights, window=window, sigma=sigma, k1=k1, k2=k2)
    if not math.prod(values.shape):
        return reduce((x - y).to(values.dtype).sum((1, 2, 3)), None, reduction, denominator)
    return reduce(1 - values, None, reduction, denominator)


CARD = Card(
    name="ms-ssim",
    room="losses",
    summary="images trained for structural similarity at several scales instead of squared error of pixels",
    paper=Paper("Learning to Generate Images with Perceptual Similarity Metrics", 2017, arxiv="1511.06409"),
    equation="loss = 1 - mean(l cs)_M^w_M prod_(j < M) mean(cs)_j^w_j",
    claim="Observers prefer images of models trained with it to those trained with squared or absolute error.",
    acts_on="loss",
    entry="trimtab.losses.generation.structural_similarity:ms_ssim_loss",
    defaults=(
        Default("data_range", 1.0, "ours: pixels in [0, 1]"),
        Default("weights", _WEIGHTS, "Wang et al. 2003"),
        Default("window", 11, "Wang et al. 2004; pytorch-msssim"),
        Default("sigma", 1.5, "Wang et al. 2004; pytorch-msssim"),
        Default("k1", 0.01, "Wang et al. 2004; pytorch-msssim"),
        Default("k2", 0.03, "Wang et al. 2004; pytorch-msssim"),
        Default("reduction", "mean", "ours: over images"),
    ),
    verified={
        "equation": (
            "tests/losses/generation/test_structural_similarity.py::test_equals_numpy",
            "tests/losses/generation/test_structural_similarity.py::test_gradcheck",
            "tests/losses/generation/test_structural_similarity.py::test_gradient_is_finite",
        ),
        "reference": ("tests/losses/generation/test_structural_similarity.py::test_equals_pytorch_msssim",),
    },
    deviations=(
        "A scale's mean similarity below 1e-6 counts as 1e-6: a negative one has no power. pytorch-msssim takes 0: "
        "then the other scales lose their gradient with it.",
        "Odd images are halved with their last row or column repeated, as in Wang's code (recalled); pytorch-msssim "
        "pads with zeros.",
        "Channels are compared one by one and averaged; Wang et al. compare grey images.",
    ),
    experiments=(
        Experiment(
            "trimtab.studies.images:autoencoder",
            "loss=mse",
            "loss=ms-ssim",
            metric="ssim",
            higher_is_better=True,
            mechanism="probe_accuracy",
            outcome=(
                "better: SSIM of held-out digits 0.803 to 0.830, difference +0.028 (95 % interval +0.014 to "
                "+0.041), n=5, while squared error grows from 0.0116 to 0.0153; a linear probe of the codes "
                "0.870 to 0.873, +0.003 (-0.017 to +0.023)"
            ),
        ),
    ),
)
