"""Deep, narrow networks that hardly train on digits, alone and aligned with a small residual network."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.errors import choose
from trimtab.losses import Guidance, match_layers
from trimtab.scalars import to_scalar
from trimtab.studies._fitting import fit, minibatch
from trimtab.workloads import workload


def untrainable(
    seed: int,
    *,
    guide: str = "none",
    depth: int = 12,
    width: int = 32,
    norm: bool = False,
    alpha: float = 1.0,
    unbiased: bool = False,
    steps: int = 300,
    lr: float = 0.003,
) -> dict[str, float]:
    """Train a deep, narrow network on digits, guided or not.

    Args:
        seed: of the weights of both networks and of the batches.
        guide: `"none"`, `"untrained"` or `"trained"`: a convolutional network with two residual blocks.
        depth: hidden layers.
        width: of the hidden layers.
        norm: whether layers have the batch normalisation, ReLU and dropout of the paper's deep networks in place of
            sigmoids.
        alpha: weight of the guidance.
        unbiased: whether CKA is the unbiased one.
        steps: batches of 64.
        lr: learning rate of the first step.

    Returns:
        The test part's `accuracy` and `loss`; the mean `cka` of the matched layers on it; `signal`, the
        decimal logarithm of the norm of the first layer's gradient at the middle step; and the `guide_accuracy` (that
        of chance where the guide is untrained or absent).
    """
    choose("guide", guide, ("none", "trained", "untrained"))
    data = workload("digits-mlp").data
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        first = nn.Linear(data.train_inputs.shape[1], width)
        rest = [part for _ in range(depth - 1) for part in (*_between(width, norm), nn.Linear(width, width))]
        target = nn.Sequential(first, *rest, *_between(width, norm), nn.Linear(width, 10))
        model = _Residual()

    def batch(step: int) -> tuple[Tensor, Tensor]:
        chosen = minibatch(seed, step, 64, len(data.train_inputs))
        return data.train_inputs[chosen], data.train_targets[chosen]

    def guide_loss(step: int) -> Tensor:
        inputs, labels = batch(step)
        return F.cross_entropy(model(inputs), labels)

    if guide == "trained":
        fit(model.parameters(), guide_loss, steps=150, lr=0.01)
    model.eval()
    layers = match_layers(
        [name for name, module in target[:-1].named_modules() if isinstance(module, nn.Linear)],
        [name for name, module in model.named_modules() if isinstance(module, (nn.Conv2d, nn.AdaptiveAvgPool2d))],
    )
    signals: list[float] = []
    with Guidance(target, model, layers, unbiased=unbiased) as guidance:

        def loss_at(step: int) -> Tensor:
            inputs, labels = batch(step)
            loss = F.cross_entropy(target(inputs), labels)
            if guide != "none":
                loss = loss + alpha * guidance.loss(inputs)
            if step == steps // 2:
                gradient = torch.autograd.grad(loss, first.weight, retain_graph=True)[0]
                signals.append(math.log10(max(to_scalar(torch.linalg.vector_norm(gradient)), 1e-30)))
            return loss

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            fit(target.parameters(), loss_at, steps=steps, lr=lr)
        target.eval()
        outputs = target(data.test_inputs)
        apart = guidance.loss(data.test_inputs)
    with torch.no_grad():
        right = outputs.argmax(-1) == data.test_targets
        known = model(data.test_inputs).argmax(-1) == data.test_targets
    return {
        "accuracy": to_scalar(right.double().mean()),
        "loss": to_scalar(F.cross_entropy(outputs, data.test_targets)),
        "cka": 1 - to_scalar(apart) / len(layers),
        "signal": signals[0] if signals else 0.0,
        "guide_accuracy": to_scalar(known.double().mean()),
    }


def _between(width: int, norm: bool) -> list[nn.Module]:
    """Return what stands between two linear layers."""
    return [nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(0.1)] if norm else [nn.Sigmoid()]


class _Residual(nn.Module):
    """A stem, two residual blocks of two convolutions with batch normalisation, and a head."""

    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, channels, 3, padding=1, bias=False)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.BatchNorm2d(channels),
                nn.ReLU(),
                nn.Conv2d(channels, channels, 3, padding=1, bias=False),
                nn.BatchNorm2d(channels),
                nn.ReLU(),
                nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            )
            for _ in range(2)
        )
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.head = nn.Linear(4 * channels, 10)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return logits [B, 10] of images [B, 64]."""
        x = self.stem(inputs.view(-1, 1, 8, 8))
        for block in self.blocks:
            x = x + block(x)
        return self.head(self.pool(F.relu(x)).flatten(1))
