"""A small diffusion transformer on handwritten digits, whose norms are modulated in one of three ways."""

from __future__ import annotations

import math
import statistics

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.layers.norms.adaptive_norm import AdaptiveBlock, AdaptiveModulation, SharedModulation
from trimtab.scalars import to_scalar
from trimtab.studies._fitting import minibatch
from trimtab.workloads.transformer import SelfAttention
from trimtab.workloads.workload import workload

_SIDE, _PATCH, _CLASSES, _HEADS = 8, 2, 10, 4
_TOKENS, _PIXELS = (_SIDE // _PATCH) ** 2, _PATCH**2
_WAVES = 8
_TEST_SEED = 20260102


class _Denoiser(nn.Module):
    """Predict v = cos(a) noise - sin(a) image of a noised image, a = pi t / 2, for a time t and a class."""

    def __init__(self, kind: str, layers: int, width: int, rank: int) -> None:
        super().__init__()
        self.patch = nn.Linear(_PIXELS, width)
        self.position = nn.Parameter(0.02 * torch.randn(_TOKENS, width))
        self.time = nn.Sequential(nn.Linear(2 * _WAVES, width), nn.SiLU(), nn.Linear(width, width))
        self.label = nn.Embedding(_CLASSES, width)
        parts = [
            (SelfAttention(width, _HEADS, causal=False), nn.Linear(width, 4 * width), nn.Linear(4 * width, width))
            for _ in range(layers)
        ]
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, _PIXELS)
        # Last, so that all else is drawn alike whatever the kind.
        self.shared = SharedModulation(width) if kind != "full" else None
        self.blocks = nn.ModuleList(
            AdaptiveBlock(
                width, attention, nn.Sequential(up, nn.GELU(), down), AdaptiveModulation(width, kind, rank=rank)
            )
            for attention, up, down in parts
        )

    def forward(self, images_BLP: Tensor, time_B: Tensor, labels_B: Tensor) -> Tensor:
        angles = time_B[:, None] * math.pi * 2.0 ** torch.arange(_WAVES)
        condition = self.time(torch.cat([angles.sin(), angles.cos()], dim=1)) + self.label(labels_B)
        shared = None if self.shared is None else self.shared(condition)
        x_BLD = self.patch(images_BLP) + self.position
        for block in self.blocks:
            x_BLD = block(x_BLD, condition, shared)
        return self.head(self.norm(x_BLD))


def denoising(
    seed: int,
    *,
    kind: str = "full",
    rank: int = 2,
    layers: int = 4,
    width: int = 48,
    steps: int = 150,
    batch: int = 32,
    lr: float = 0.003,
) -> dict[str, float]:
    """Train a class-conditional diffusion transformer on digits and measure it on held-out ones.

    Args:
        seed: of initialisation, batches and noise.
        kind: of modulation: one of `AdaptiveModulation`'s.
        rank: of its low-rank part; the authors' is a 32nd of the width.
        layers: blocks.
        width: D.
        steps: of Adam, at a rate that falls along half a cosine.
        batch: images a step.
        lr: learning rate of the first step.

    Returns:
        `loss`, the mean squared error of v on held-out images, at noise and times that are always the same;
        `parameters` and of them `modulation_parameters`; `spike`, the largest gradient norm of the second half of the
        steps over its median.
    """
    data = workload("digits-mlp").prepare()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _Denoiser(kind, layers, width, rank)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    norms: list[float] = []
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * 0.5 * (1 + math.cos(math.pi * step / steps))
        chosen = minibatch(seed, step, batch, len(data.train_inputs))
        optimizer.zero_grad()
        loss = _loss(model, data.train_inputs[chosen], data.train_targets[chosen], seed * 1_000_003 + step)
        loss.backward()
        norms.append(math.hypot(*(to_scalar(p.grad.norm()) for p in model.parameters() if p.grad is not None)))
        if not math.isfinite(norms[-1]):
            break
        optimizer.step()
    with torch.no_grad():
        reached = to_scalar(_loss(model, data.test_inputs, data.test_targets, _TEST_SEED))
    second = norms[len(norms) // 2 :]
    spike = max(second) / max(statistics.median(second), 1e-30)
    modulation = [part for part in model.modules() if isinstance(part, (SharedModulation, AdaptiveModulation))]
    return {
        # The error of predicting 0 everywhere is about 1: what diverged counts as that.
        "loss": min(reached, 1.0) if math.isfinite(reached) else 1.0,
        "parameters": float(sum(p.numel() for p in model.parameters())),
        "modulation_parameters": float(sum(p.numel() for part in modulation for p in part.parameters())),
        "spike": min(spike, 1e6) if math.isfinite(spike) else 1e6,
    }


def _loss(model: _Denoiser, pixels: Tensor, labels: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    patches = _SIDE // _PATCH
    images = pixels.view(-1, patches, _PATCH, patches, _PATCH).transpose(2, 3).reshape(-1, _TOKENS, _PIXELS)
    noise = torch.randn(images.shape, generator=generator)
    time = torch.rand(len(images), generator=generator)
    sin, cos = ((time * math.pi / 2).sin()[:, None, None], (time * math.pi / 2).cos()[:, None, None])
    return F.mse_loss(model(cos * images + sin * noise, time, labels), cos * noise - sin * images)
