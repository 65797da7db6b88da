"""A generator of points in the plane against a critic: eight Gaussians on a circle."""

from __future__ import annotations

import math
import statistics

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.errors import choose
from trimtab.losses.generation.wasserstein_gan import critic_loss, generator_loss, gradient_penalty
from trimtab.scalars import to_scalar

_WORST = 10.0  # of a distance between points that all lie within 2 of the middle


def _network(inputs: int, outputs: int, width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, outputs)
    )


def _real(count: int, generator: torch.Generator) -> Tensor:
    """Return points of eight Gaussians on a circle of radius sqrt(2), as the paper's toy has them."""
    angle = torch.randint(8, (count,), generator=generator) * (math.pi / 4)
    return math.sqrt(2) * torch.stack([angle.cos(), angle.sin()], 1) + 0.0141 * torch.randn(
        count, 2, generator=generator
    )


def _distance(x: Tensor, y: Tensor) -> float:
    """Return the energy distance of two samples, 0 for the same distribution."""
    pairs = torch.cdist(x, y).mean() * 2 - torch.cdist(x, x).mean() - torch.cdist(y, y).mean()
    value = to_scalar(pairs)
    return min(value, _WORST) if math.isfinite(value) else _WORST


def gaussians(
    seed: int,
    *,
    loss: str = "gp",
    lr: float = 0.003,
    weight: float = 1.0,
    clip: float = 0.1,
    steps: int = 250,
    width: int = 64,
) -> dict[str, float]:
    """Train a generator for some steps, with five of the critic to each.

    Args:
        seed: of data, noise, points in between and initialisation.
        loss: `"gp"` (the gradient penalty), `"clip"` (weights of the critic clipped)
            or `"standard"` (logistic, not saturating).
        lr: of Adam with betas 0.5 and 0.9, for both networks.
        weight: of the penalty.
        clip: bound of the critic's weights where they are clipped.
        steps: of the generator, with batches of 64.
        width: of two hidden layers each.

    Returns:
        `distance`, the mean energy distance to the data over the last five of 25 measurements; `wobble`, its standard
        deviation over the last ten; `slope_error`, the mean distance from 1 of the critic's slope between samples at
        the end; `modes`, of the eight, that hold at least 2 % of the samples within 0.3 at the end.
    """
    choose("loss", loss, ("gp", "clip", "standard"))
    generator = torch.Generator().manual_seed(seed)
    held = torch.Generator().manual_seed(seed + 1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        maker, critic = _network(2, 2, width), _network(2, 1, width)
    makers = torch.optim.Adam(maker.parameters(), lr=lr, betas=(0.5, 0.9))
    critics = torch.optim.Adam(critic.parameters(), lr=lr, betas=(0.5, 0.9))
    reference, noise = _real(400, held), torch.randn(400, 2, generator=held)
    distances: list[float] = []

    for step in range(steps):
        for _ in range(5):
            real = _real(64, generator)
            with torch.no_grad():
                fake = maker(torch.randn(64, 2, generator=generator))
            mix = torch.rand(64, generator=generator)
            on_real, on_fake = critic(real).squeeze(1), critic(fake).squeeze(1)
            if loss == "standard":
                value = F.softplus(-on_real).mean() + F.softplus(on_fake).mean()
            else:
                value = critic_loss(on_real, on_fake)
            if loss == "gp":
                value = value + gradient_penalty(critic, real, fake, mix=mix, weight=weight)
            critics.zero_grad()
            value.backward()
            critics.step()
            if loss == "clip":
                with torch.no_grad():
                    for parameter in critic.parameters():
                        parameter.clamp_(-clip, clip)
        on_fake = critic(maker(torch.randn(64, 2, generator=generator))).squeeze(1)
        value = F.softplus(-on_fake).mean() if loss == "standard" else generator_loss(on_fake)
        makers.zero_grad()
        value.backward()
        makers.step()
        if (step + 1) % max(1, steps // 25) == 0:
            with torch.no_grad():
                distances.append(_distance(maker(noise), reference))

    with torch.no_grad():
        made = maker(noise)
    # The penalty of weight 1 is the squared distance from slope 1.
    squares = gradient_penalty(critic, reference, made, generator=held, weight=1.0, reduction="none").detach()
    angles = torch.arange(8) * (math.pi / 4)
    centers = math.sqrt(2) * torch.stack([angles.cos(), angles.sin()], 1)
    modes = (torch.cdist(centers, made.nan_to_num()) < 0.3).float().mean(1) >= 0.02
    slope = to_scalar(squares.sqrt().mean())
    return {
        "distance": statistics.fmean(distances[-5:]),
        "wobble": statistics.pstdev(distances[-10:]),
        "slope_error": min(slope, 1e3) if math.isfinite(slope) else 1e3,
        "modes": to_scalar(modes.sum().float()),
    }
