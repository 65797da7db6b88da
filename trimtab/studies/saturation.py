"""Outputs that begin saturated: an image as a function of its coordinates, through a sigmoid."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from trimtab.layers import ScaledSigmoid
from trimtab.scalars import to_scalar
from trimtab.studies._fitting import fit, last

_SIDE = 24
_TARGET = 0.01
_EDGE = 0.01


def coordinate_fit(
    seed: int, *, alpha: float = 1.0, spread: float = 8.0, width: int = 64, steps: int = 300, lr: float = 0.003
) -> dict[str, float]:
    """Fit the colours of an image, smooth waves in (0, 1), by a network of the pixels' coordinates.

    Args:
        seed: of the image and of the weights.
        alpha: of the scaled sigmoid on the colours; 1 is the sigmoid.
        spread: standard deviation, at initialisation, of what goes into it.
        width: of the two hidden layers.
        steps: of Adam on all pixels.
        lr: learning rate of the first step.

    Returns:
        `steps_to_target`: steps until the mean squared error is 0.01, `steps` if it never is; the last `loss`; and
        `saturated`: the share of colours below 0.01 or above 0.99, at the first step.
    """
    generator = torch.Generator().manual_seed(seed)
    axis = torch.linspace(-1, 1, _SIDE)
    place = torch.cartesian_prod(axis, axis)
    waves = torch.randn(2, 3, 4, generator=generator) * math.pi
    phases = torch.rand(3, 4, generator=generator) * 2 * math.pi
    target = 0.5 + 0.45 * torch.einsum("nd,dck->nck", place, waves).add(phases).sin().mean(-1) / 0.5
    target = target.clamp(0.0, 1.0)
    encoded = place @ (torch.randn(2, width, generator=generator) * math.pi)
    features = torch.cat([encoded.sin(), encoded.cos()], dim=1)
    network = nn.Sequential(
        nn.Linear(2 * width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 3)
    )
    layers = [part for part in network if isinstance(part, nn.Linear)]
    for layer in layers:
        nn.init.normal_(layer.weight, 0.0, math.sqrt(2 / layer.in_features), generator=generator)
        nn.init.zeros_(layer.bias)
    with torch.no_grad():
        layers[-1].weight.mul_(spread / network(features).std())
    output = ScaledSigmoid(alpha)
    with torch.no_grad():
        colours = output(network(features))
        saturated = ((colours < _EDGE) | (colours > 1 - _EDGE)).double().mean()

    def loss_at(step: int) -> Tensor:
        return (output(network(features)) - target).square().mean()

    losses = fit(network.parameters(), loss_at, steps=steps, lr=lr)
    reached = next((step for step, loss in enumerate(losses) if loss <= _TARGET), steps)
    return {"steps_to_target": float(reached), "loss": last(losses), "saturated": to_scalar(saturated)}
