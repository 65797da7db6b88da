"""Faults in gradients, put in on purpose: spikes and heavy-tailed outliers, for claims about methods against them.

    spike, with probability p a step:    g_j <- c g_j                     for one parameter tensor j, drawn uniformly
    outliers, for a fraction q of entries:    g_i <- g_i + c rms(g) t_i     with t of Student's t with 2 degrees

Both follow from the seed and the step alone, so paired arms and resumed runs meet the same ones.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from trimtab.scalars import to_scalar

_SMALLEST = 1e-6
"""Distance of a uniform draw from 0 and 1: it bounds |t| by 708, so that no outlier is infinite."""


@torch.no_grad()
def inject(
    parameters: Iterable[nn.Parameter], seed: int, step: int, *, spikes: float, outliers: float, scale: float
) -> None:
    """Change gradients in place as the faults of a step demand.

    Args:
        parameters: those without a gradient are left alone.
        seed: the run's seed.
        step: the step, from 0.
        spikes: probability that the step has a spike, in [0, 1].
        outliers: fraction of entries with heavy-tailed noise, in [0, 1].
        scale: c, above 0.

    Example:
        >>> weight = nn.Parameter(torch.zeros(2))
        >>> weight.grad = torch.tensor([1.0, -2.0])
        >>> inject([weight], 0, 0, spikes=1.0, outliers=0.0, scale=10.0)
        >>> weight.grad.tolist()
        [10.0, -20.0]
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    digest = hashlib.blake2b(f"faults of seed {seed} step {step}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    # Always drawn, so that whether there are outliers does not move the spikes.
    happens = to_scalar(torch.rand((), generator=generator, dtype=torch.float64)) < spikes
    struck = int(to_scalar(torch.randint(max(1, len(gradients)), (), generator=generator)))
    if outliers:
        for gradient in gradients:
            gradient += scale * _tails(gradient, outliers, generator)
    if happens and gradients:
        gradients[struck].mul_(scale)


def _tails(gradient: Tensor, fraction: float, generator: torch.Generator) -> Tensor:
    """Return rms(g) t on a random fraction of the entries, 0 elsewhere."""
    chosen = torch.rand(gradient.shape, generator=generator) < fraction
    u = torch.rand(gradient.shape, generator=generator, dtype=torch.float64).clamp_(_SMALLEST, 1 - _SMALLEST)
    t = (2 * u - 1) / (2 * u * (1 - u)).sqrt()
    return gradient.square().mean().sqrt() * (chosen * t).to(gradient)
