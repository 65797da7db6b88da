"""What studies share: a plain training loop whose outcome is always a finite number."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from trimtab.scalars import to_scalar


def fit(
    parameters: Iterable[Tensor],
    loss_at: Callable[[int], Tensor],
    *,
    steps: int,
    lr: float,
    momentum: float | None = None,
) -> list[float]:
    """Minimise a loss by Adam at a rate that falls to 0 along half a cosine, and return the loss of every step.

    A loss that is not finite ends the training.

    Args:
        parameters: what is trained.
        loss_at: the loss of a step.
        steps: how many.
        lr: learning rate of the first step.
        momentum: SGD with this momentum, in place of Adam.
    """
    trained = list(parameters)
    optimizer: torch.optim.Optimizer = torch.optim.Adam(trained, lr=lr)
    if momentum is not None:
        optimizer = torch.optim.SGD(trained, lr=lr, momentum=momentum)
    losses: list[float] = []
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.zero_grad()
        loss = loss_at(step)
        losses.append(to_scalar(loss))
        if not math.isfinite(losses[-1]):
            break
        loss.backward()
        optimizer.step()
    return losses


def last(losses: list[float], share: float = 0.1) -> float:
    """Return the mean of the last losses, or the first one where training diverged or ended above it."""
    count = max(1, int(len(losses) * share))
    mean = statistics.fmean(losses[-count:])
    return mean if math.isfinite(mean) and mean <= losses[0] else losses[0]


def minibatch(seed: int, step: int, size: int, total: int) -> Tensor:
    """Return indices of a step's samples, drawn with replacement; the same for the same seed and step."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    return torch.randint(total, (size,), generator=generator)
