"""How closely networks fit a smooth curve: one of them, or several in stages, of equal parameters and steps."""

from __future__ import annotations

import math

import torch

from trimtab.layers import fit_multi_stage
from trimtab.scalars import to_scalar

_SMALLEST = 1e-17


def curve(
    seed: int, *, stages: int = 3, width: int = 20, adam_steps: int = 300, lbfgs_steps: int = 1500
) -> dict[str, float]:
    """Fit log(t + 2) cos(2 t + t^3) on [-1, 1], the authors' first example, in float64.

    A single stage has the parameters, and the steps, that `stages=3` has in all.

    Args:
        seed: of the weights.
        stages: networks.
        width: of three stages' hidden layers; a single one's is wider.
        adam_steps: of all stages together.
        lbfgs_steps: likewise.

    Returns:
        `log10_error`, of the relative error (root mean square) on points between the samples; the `parameters`; and
        `last_kappa`, the scale of the last stage's first layer.
    """
    samples, between = (torch.linspace(-1.02, 1.02, 301, dtype=torch.float64)[:, None], torch.linspace(-1, 1, 1000))
    points = between.to(torch.float64)[:, None]
    # Three hidden layers of width w have 2 w^2 + 5 w + 1 parameters.
    total = 3 * (2 * width**2 + 5 * width + 1)
    own = width if stages > 1 else math.floor((math.sqrt(25 + 8 * (total - 1)) - 5) / 4)
    network, reports = fit_multi_stage(
        samples,
        _curve(samples),
        stages=stages,
        width=own,
        adam_steps=adam_steps // stages,
        lbfgs_steps=lbfgs_steps // stages,
        generator=torch.Generator().manual_seed(seed),
    )
    with torch.no_grad():
        error = (network(points) - _curve(points)).square().mean().sqrt() / _curve(points).square().mean().sqrt()
    found = to_scalar(error)
    return {
        "log10_error": math.log10(max(found, _SMALLEST)) if math.isfinite(found) else 0.0,
        "parameters": float(sum(p.numel() for p in network.parameters())),
        "last_kappa": reports[-1].kappa,
    }


def _curve(t: torch.Tensor) -> torch.Tensor:
    return (t + 2).log() * (2 * t + t**3).cos()
