"""Losses of single samples: the worst of them, and right answers among several tries."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.errors import require
from trimtab.losses.tuning.coverage_optimization import dco_loss
from trimtab.losses.tuning.sample_constraints import FeasibleLearning
from trimtab.scalars import to_scalar
from trimtab.studies._fitting import fit, minibatch

_WORST = 1e3


def _network(seed: int, inputs: int, outputs: int, width: int) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, outputs))


def constraints(
    seed: int,
    *,
    dual_lr: float = 0.0,
    epsilon: float = 0.1,
    lr: float = 0.003,
    steps: int = 600,
    width: int = 12,
) -> dict[str, float]:
    """Train a narrow network on 900 digits with a multiplier for each, which begins at 1.

    Args:
        seed: of split, initialisation and batches.
        dual_lr: step size of the multipliers; at 0 it is the mean loss.
        epsilon: bound on each sample's loss.
        lr: of Adam, along half a cosine.
        steps: with batches of 64.
        width: of the hidden layer.

    Returns:
        Of held-out digits: `cvar`, the mean of the worst twentieth of losses, `p99`, their 99th percentile, `mean` and
        `accuracy`; `train_cvar` and `train_mean`; `vanished`, the share of multipliers at 0 among satisfied samples.
    """
    bunch = require("sklearn.datasets", extra="workloads").load_digits()
    order = torch.randperm(len(bunch.target), generator=torch.Generator().manual_seed(seed))
    inputs = torch.from_numpy(bunch.data).float()[order] / 8 - 1
    labels = torch.from_numpy(bunch.target).long()[order]
    train = 900
    model = _network(seed, 64, 10, width)
    feasible = FeasibleLearning(train, epsilon=epsilon, dual_lr=dual_lr, initial=1.0)

    def loss_at(step: int) -> Tensor:
        index = minibatch(seed, step, 64, train)
        losses = F.cross_entropy(model(inputs[index]), labels[index], reduction="none")
        feasible.ascend(losses.detach(), index)
        return feasible(losses, index)

    fit(model.parameters(), loss_at, steps=steps, lr=lr)
    with torch.no_grad():
        logits = model(inputs)
        losses = F.cross_entropy(logits, labels, reduction="none").nan_to_num(nan=_WORST).clamp(max=_WORST)
    held, seen = losses[train:].sort().values, losses[:train].sort().values
    satisfied = losses[:train] < epsilon
    vanished = (feasible.multipliers == 0) & satisfied
    return {
        "cvar": to_scalar(held[-len(held) // 20 :].mean()),
        "p99": to_scalar(held.quantile(0.99)),
        "mean": to_scalar(held.mean()),
        "accuracy": to_scalar((logits[train:].argmax(-1) == labels[train:]).float().mean()),
        "train_cvar": to_scalar(seen[-train // 20 :].mean()),
        "train_mean": to_scalar(seen.mean()),
        "vanished": to_scalar(vanished.sum() / satisfied.sum().clamp(min=1)),
    }


def coverage(
    seed: int, *, samples: int = 1, tries: int = 8, lr: float = 0.003, steps: int = 500, width: int = 64
) -> dict[str, float]:
    """Train on 300 questions whose answers are drawn, one each, from a distribution over 12, and try several times.

    Args:
        seed: of data, initialisation and batches.
        samples: N of the loss; at 1 it is cross-entropy.
        tries: N at test time.
        lr: of Adam, along half a cosine.
        steps: with batches of 64.
        width: of the hidden layer.

    Returns:
        `pass_at_n` of 2,000 other questions, each with an answer drawn, `decline` from the best of ten measurements on
        the way to it, `confidence`, the mean largest probability, and `loss`, the cross-entropy.
    """
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(2300, 16, generator=generator)
    rule = torch.randn(16, 12, generator=generator) / 16**0.5
    answers = torch.multinomial(torch.softmax(2.5 * inputs @ rule, -1), 1, generator=generator).squeeze(1)
    train = 300
    model = _network(seed, 16, 12, width)
    passes: list[float] = []

    def log_probs(rows: Tensor | slice) -> Tensor:
        return torch.log_softmax(model(inputs[rows]), -1).gather(-1, answers[rows].unsqueeze(-1)).squeeze(-1)

    @torch.no_grad()
    def measure() -> None:
        p = log_probs(slice(train, None)).exp().nan_to_num()
        passes.append(to_scalar((1 - (1 - p) ** tries).mean()))

    def loss_at(step: int) -> Tensor:
        if step % max(1, steps // 10) == 0:
            measure()
        return dco_loss(log_probs(minibatch(seed, step, 64, train)), samples=samples)

    fit(model.parameters(), loss_at, steps=steps, lr=lr)
    measure()
    with torch.no_grad():
        confidence = torch.softmax(model(inputs[train:]), -1).amax(-1).nan_to_num(nan=1.0).mean()
        loss = -log_probs(slice(train, None)).nan_to_num(nan=-_WORST).clamp(min=-_WORST).mean()
    return {
        "pass_at_n": passes[-1],
        "decline": max(passes) - passes[-1],
        "confidence": to_scalar(confidence),
        "loss": to_scalar(loss),
    }
