"""Adversarial training of a small network on few digits, long enough to overfit to the attack."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.errors import choose, require
from trimtab.losses.robustness.annealed_rectification import annealed, rectified_cross_entropy, rectified_targets
from trimtab.scalars import to_scalar
from trimtab.studies._fitting import fit, minibatch

_TRAIN, _TEST = 200, 600


def _digits(seed: int) -> tuple[Tensor, Tensor]:
    """Return digits of 8 x 8 pixels in [0, 1], flat, and their classes, shuffled."""
    bunch = require("sklearn.datasets", extra="workloads").load_digits()
    order = torch.randperm(len(bunch.target), generator=torch.Generator().manual_seed(seed))
    return torch.from_numpy(bunch.data).float()[order] / 16, torch.from_numpy(bunch.target).long()[order]


def perturbed(
    model: nn.Module, inputs: Tensor, targets: Tensor, *, epsilon: float, steps: int, generator: torch.Generator
) -> Tensor:
    """Return inputs moved by projected gradient ascent of the loss, each pixel by at most epsilon and within [0, 1].

    Args:
        model: what is attacked.
        inputs: [B, D].
        targets: classes [B], or their probabilities [B, V].
        epsilon: bound of the perturbation of a pixel.
        steps: of epsilon / 4, from a random start.
        generator: of the start.
    """
    low, high = (inputs - epsilon).clamp(min=0), (inputs + epsilon).clamp(max=1)
    moved = low + (high - low) * torch.rand(inputs.shape, generator=generator)
    for _ in range(steps):
        moved.requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(model(moved), targets), moved)
        moved = (moved.detach() + 0.25 * epsilon * gradient.sign()).clamp(low, high)
    return moved


def overfitting(
    seed: int, *, targets: str = "one-hot", lr: float = 0.03, steps: int = 300, epsilon: float = 0.1, width: int = 128
) -> dict[str, float]:
    """Train a two-layer network on 200 digits against projected gradient ascent, and attack it on 600 others.

    Args:
        seed: of data, initialisation, batches and attacks.
        targets: `"one-hot"` or `"adr"`, the paper's rectified ones (tau 2.5 to 2.0, lambda 0.7 to 0.95, average 0.995).
        lr: of Adam, along half a cosine.
        steps: of training, with batches of 64 and five steps of attack.
        epsilon: of the attack, in pixels of [0, 1].
        width: of the hidden layer.

    Returns:
        `robust_accuracy` and `accuracy` at the end, `gap` from the best of ten on the way to the last.
    """
    choose("targets", targets, ("one-hot", "adr"))
    inputs, labels = _digits(seed)
    held, held_labels = inputs[_TRAIN : _TRAIN + _TEST], labels[_TRAIN : _TRAIN + _TEST]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))
    average = copy.deepcopy(model)
    starts = torch.Generator().manual_seed(seed)
    robust: list[float] = []

    def accuracy(attacked: bool) -> float:
        seen = held
        if attacked:
            seen = perturbed(
                model, held, held_labels, epsilon=epsilon, steps=10, generator=torch.Generator().manual_seed(seed + 1)
            )
        with torch.no_grad():
            return to_scalar((model(seen).argmax(-1) == held_labels).float().mean())

    def loss_at(step: int) -> Tensor:
        with torch.no_grad():
            for mean, value in zip(average.parameters(), model.parameters(), strict=True):
                mean.lerp_(value, 1 - 0.995)
        if step % max(1, steps // 10) == 0:
            robust.append(accuracy(True))
        batch = minibatch(seed, step, 64, _TRAIN)
        x, y = inputs[batch], labels[batch]
        tau, mix = annealed(2.5, 2.0, step / steps), annealed(0.7, 0.95, step / steps)
        teacher = average(x).detach()
        if targets == "one-hot":
            mix = 0.0
        soft = rectified_targets(teacher, y, temperature=tau, mix=mix)
        moved = perturbed(model, x, soft, epsilon=epsilon, steps=5, generator=starts)
        return rectified_cross_entropy(model(moved), y, teacher_logits=teacher, temperature=tau, mix=mix)

    fit(model.parameters(), loss_at, steps=steps, lr=lr)
    robust.append(accuracy(True))
    return {"robust_accuracy": robust[-1], "gap": max(robust) - robust[-1], "accuracy": accuracy(False)}
