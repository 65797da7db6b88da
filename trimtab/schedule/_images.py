"""What curricula of images share: batches that may come flat, and the square of a size."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from trimtab.errors import UsageError


def as_images(images: Tensor, shape: Sequence[int] | None) -> Tensor:
    """Return a batch as [B, C, H, W].

    Args:
        images: [B, C, H, W], or flat, [B, C * H * W].
        shape: C, H and W of flat images; None where they are not flat.

    Returns:
        A view where possible.

    Raises:
        UsageError: if the images are neither, or the shape does not hold their pixels.
    """
    if shape is None:
        if images.dim() != 4:
            raise UsageError(f"images must be [B, C, H, W], got {list(images.shape)}: give flat ones with their shape.")
        return images
    if images.dim() != 2 or len(shape) != 3 or math.prod(shape) != images.shape[1]:
        raise UsageError(f"shape must be the C, H, W of images [B, C * H * W], got {shape} for {list(images.shape)}.")
    return images.reshape(-1, *shape)


def guessed_shape(inputs: Tensor) -> tuple[int, int, int] | None:
    """Return the shape of flat square grey images, or None for images that are not flat.

    Raises:
        UsageError: if the inputs are neither.
    """
    if inputs.dim() == 4:
        return None
    side = math.isqrt(inputs.shape[1]) if inputs.dim() == 2 else 0
    if not side or side * side != inputs.shape[1] or not inputs.is_floating_point():
        raise UsageError(f"inputs {list(inputs.shape)} of {inputs.dtype} are not images [B, C, H, W] or [B, H * H].")
    return 1, side, side
