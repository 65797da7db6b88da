"""EfficientTrain: low frequencies and weak augmentation first, all samples at all times.

    x_B = IFFT( (B / H)^2 * the central B x B of FFT(x) )        B x B pixels in place of H x H

For B the paper's schedule is 160, 160, 160, 192, 224 of 224 pixels in fifths of the training, while the magnitude of
RandAugment rises linearly from 0 to 9 (Wang et al. 2023, arXiv:2211.09703). The crop keeps the low frequencies exactly,
unlike resizing, and at (160/224)^2 of the cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trimtab.card import Card, Default, Paper
from trimtab.errors import UsageError, choose
from trimtab.schedule._images import as_images, guessed_shape
from trimtab.schedule._shape import count, whole
from trimtab.schedule._sizes import Batches, Sizes

__all__ = ["EfficientTrain", "efficient_train", "low_frequency"]

_BANDS = (5 / 7, 5 / 7, 5 / 7, 6 / 7, 1.0)
_MAGNITUDE = 9.0


def low_frequency(images: Tensor, band: int, *, shape: Sequence[int] | None = None, keep_size: bool = False) -> Tensor:
    """Return the low frequencies of images, as images of `band` x `band` pixels.

    Args:
        images: [B, C, H, W] of a floating dtype, or flat with their `shape`.
        band: side of the new images, B, even (an odd one is lowered by 1), in [2, min(H, W)].
        shape: C, H and W of flat images.
        keep_size: low-pass at full size instead, for models that take one size only: nothing is cheaper.

    Returns:
        [B, C, band, band], or flat if they came flat. A band of the images' own size returns them as they are.

    Raises:
        UsageError: if the band does not fit, or the images are not what the arguments say.

    Example:
        >>> x = torch.full((1, 1, 8, 8), 3.0)
        >>> bool(torch.isclose(low_frequency(x, 4), torch.tensor(3.0)).all())
        True

    References:
        Wang et al. 2023, arXiv:2211.09703.
    """
    x = as_images(images, shape)
    height, width = x.shape[-2:]
    if not 2 <= count("band", band) <= min(height, width):
        raise UsageError(f"band must be in [2, {min(height, width)}], the images' side, got {band}.")
    if band < max(height, width):
        half = band // 2
        spectrum = torch.fft.fft2(x if x.dtype == torch.float64 else x.float())
        rows = torch.cat([torch.arange(half), torch.arange(height - half, height)]).to(x.device)
        columns = torch.cat([torch.arange(half), torch.arange(width - half, width)]).to(x.device)
        central = spectrum.index_select(-2, rows).index_select(-1, columns)
        if keep_size:
            spectrum = torch.zeros_like(spectrum)
            spectrum[..., rows[:, None], columns] = central
            central = spectrum
        # The inverse divides by the new number of pixels: this keeps the images' mean.
        central = central * (central.shape[-2] * central.shape[-1] / (height * width))
        x = torch.fft.ifft2(central).real.to(x.dtype)
    return x if shape is None else x.flatten(1)


@dataclass(frozen=True)
class EfficientTrain:
    """EfficientTrain's curriculum: pure functions of the step.

    Attributes:
        band: side of the images at a step, B.
        total: steps in all.
        follow: whose magnitudes.
    """

    band: Sizes
    total: int
    follow: str

    def magnitude(self, step: int) -> float:
        """Return the magnitude of RandAugment at a step, counted from 0: from 0 to 9 (code: 1, 3, 5, 7, 9)."""
        reached = min(1.0, whole("step", step) / self.total)
        if self.follow == "code":
            return 2.0 * min(4, step * 5 // self.total) + 1
        return _MAGNITUDE * reached


def efficient_train(full: int, total: int, *, follow: str = "paper") -> EfficientTrain:
    """Return the curriculum of a run.

    Args:
        full: side of the full images, in pixels, at least 2; bands are 5/7, 6/7 and all of it, as even numbers.
        total: steps in all, at least 1.
        follow: whose magnitudes of augmentation: `"paper"`, rising at each step, or `"code"`, one for each fifth.

    Returns:
        Bands and magnitudes.

    Raises:
        UsageError: if an argument breaks its rule.

    Example:
        >>> plan = efficient_train(224, 300)
        >>> [plan.band(epoch) for epoch in (0, 179, 180, 239, 240, 300)]
        [160, 160, 192, 192, 224, 224]
        >>> [plan.magnitude(epoch) for epoch in (0, 150, 300)]
        [0.0, 4.5, 9.0]
    """
    count("full", full, 2), whole("total", total, 1), choose("follow", follow, ("paper", "code"))
    # Halves round to even numbers: 2 round(B / 2) is the even number next to B.
    table = [full if share == 1 else max(2, 2 * round(full * share / 2)) for share in _BANDS]
    table = [min(full, band) for band in table]

    def band(step: int) -> int:
        return table[min(len(table) - 1, step * len(table) // total)]

    ramp = -(-total * table.index(full) // len(table))
    return EfficientTrain(Sizes("efficient-train", band, full, ramp, (("full", full), ("total", total))), total, follow)


def _apply(batches: Batches, *, model: nn.Module, steps: int) -> Batches:
    """Return the batches of a run with the low frequencies of its images first.

    Args:
        batches: from a step to images and targets; flat square grey images keep their size and lose their detail.
        model: is not looked at.
        steps: of the run.

    Returns:
        The images of each stage.
    """
    del model

    def low(step: int) -> tuple[Tensor, Tensor]:
        inputs, targets = batches(step)
        shape = guessed_shape(inputs)
        side = min(inputs.shape[-2:]) if shape is None else shape[-1]
        band = efficient_train(side, steps).band(step)
        return low_frequency(inputs, band, shape=shape, keep_size=shape is not None), targets

    return low


CARD = Card(
    name="efficient-train",
    room="schedule",
    summary="low image frequencies and weak augmentation first, by a three-stage schedule",
    paper=Paper(
        "EfficientTrain: Exploring Generalized Curriculum Learning for Training Visual Backbones",
        2023,
        arxiv="2211.09703",
        code="https://github.com/LeapLabTHU/EfficientTrain",
    ),
    equation="x_B = IFFT((B / H)^2 * central B x B of FFT(x)); B / H = 5/7 for 60 % of the steps, 6/7, 1 for 20 % each",
    claim="Training visual backbones on ImageNet takes 1.5 times less time at the same accuracy.",
    acts_on="batches",
    entry="trimtab.schedule.frequency_curriculum:efficient_train",
    defaults=(Default("follow", "paper", "paper, table 5: 0 to 9 (recalled); authors' code: 1, 3, 5, 7, 9 in fifths"),),
    verified={
        "equation": (
            "tests/schedule/test_frequency_curriculum.py::test_crop_equals_a_discrete_fourier_transform_by_hand",
            "tests/schedule/test_frequency_curriculum.py::test_schedule_is_the_papers",
            "tests/schedule/test_frequency_curriculum.py::test_costs_what_the_paper_says",
        ),
        "reference": ("tests/schedule/test_frequency_curriculum.py::test_crop_equals_numpy_and_scipy",),
    },
    deviations=(
        "Bands are given as fractions of the image's side, 160/224 = 5/7 and 192/224 = 6/7, rounded to even numbers.",
        "RandAugment itself is not here: its magnitude is a function of the step that your augmentation reads.",
        "In a run flat images are low-passed at their own size, as their models take one size: the curriculum, "
        "without its saving.",
        "Images of half precision are transformed in float32. Images that are not square are cropped to a square band, "
        "scaled by B^2 / (H W); the authors' are square.",
        "Measured (benchmarks/curricula.py, 8 x 8 digits, bands 6 and 8, n=5): worse, accuracy 98.7 % to 97.0 % at "
        "65 % of the pixels, where a run at full size of 64 % of the steps stays at 98.7 %.",
    ),
    apply=_apply,
)
