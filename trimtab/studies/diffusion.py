"""Small diffusion models of handwritten digits: how to scale a UNet's long skips, and how to weight its times.

The UNet has six long skips: three blocks at 8 x 8 and three at 4 x 4 pixels, each skip joined to the decoder by a
linear map of both, as in UViT.
"""

from __future__ import annotations

import math
import statistics
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.errors import choose
from trimtab.layers.long_skip import LongSkipScale
from trimtab.losses.clipped_snr import clipped_snr_loss
from trimtab.scalars import to_scalar
from trimtab.studies._fitting import fit, minibatch
from trimtab.workloads.workload import workload

_WIDTH, _LEVELS, _DEPTH = 16, 2, 3
_BATCH, _HELD_OUT, _EVERY = 16, 128, 10
_SCALINGS = ("none", "constant", "learnable", "sqrt2")
_WEIGHTS = ("uniform", "clipped", "min-snr")
# Mean held-out loss at which the unscaled models of seeds 100 to 102 end with the defaults of `long_skips`.
_TARGET = 0.224


class _Block(nn.Module):
    def __init__(self, width: int, times: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(4, width)
        self.first, self.second = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 1)
        self.time = nn.Linear(times, width)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        hidden = self.first(F.silu(self.norm(x))) + self.time(time)[:, :, None, None]
        return x + self.second(F.silu(hidden))


class _UNet(nn.Module):
    """Predicts the noise or the image, [B, 1, 8, 8], from a noisy image and its time in [0, 1]."""

    def __init__(self, scale: LongSkipScale | None) -> None:
        super().__init__()
        count = _LEVELS * _DEPTH
        self.frequencies = 2.0 ** torch.arange(6) * math.pi
        self.embed = nn.Sequential(nn.Linear(12, 32), nn.SiLU())
        self.inlet, self.outlet = nn.Conv2d(1, _WIDTH, 3, padding=1), nn.Conv2d(_WIDTH, 1, 3, padding=1)
        self.down, self.up = (nn.ModuleList(_Block(_WIDTH, 32) for _ in range(count)) for _ in range(2))
        self.middle = _Block(_WIDTH, 32)
        self.join = nn.ModuleList(nn.Conv2d(2 * _WIDTH, _WIDTH, 1) for _ in range(count))
        self.scale = scale

    def features(self, x: Tensor, t: Tensor) -> Tensor:
        """Return the last hidden feature."""
        angles = t[:, None] * self.frequencies
        time = self.embed(torch.cat([angles.sin(), angles.cos()], dim=1))
        x, skips = self.inlet(x), []
        for index, block in enumerate(self.down):
            if index == _DEPTH:
                x = F.avg_pool2d(x, 2)
            x = block(x, time)
            skips.append(x)
        x = self.middle(x, time)
        scaled = skips if self.scale is None else self.scale(skips)
        for index, (block, join, skip) in enumerate(zip(self.up, self.join, reversed(scaled), strict=True)):
            if index == _DEPTH:
                x = F.interpolate(x, scale_factor=2.0)
            x = block(join(torch.cat([x, skip], dim=1)), time)
        return x

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.outlet(F.silu(self.features(x, t)))


def _images() -> tuple[Tensor, Tensor]:
    data = workload("digits-mlp").data
    return data.train_inputs.view(-1, 1, 8, 8), data.test_inputs.view(-1, 1, 8, 8)


def _alpha_bar(t: Tensor) -> Tensor:
    """Return the cosine schedule of Nichol and Dhariwal 2021."""
    return torch.cos((t + 0.008) / 1.008 * math.pi / 2).square()


def _noisy(x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    alpha_bar = _alpha_bar(t).view(-1, 1, 1, 1)
    return alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * noise


def _draw(images: Tensor, seed: int, step: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return a step's images, times and noise."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step + 500_000)
    t = 0.001 + 0.998 * torch.rand(_BATCH, generator=generator)
    return images[minibatch(seed, step, _BATCH, len(images))], t, torch.randn(_BATCH, 1, 8, 8, generator=generator)


def _model(seed: int, scaling: str, kappa: float) -> _UNet:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _UNet(None)
        # After all others, so that their initial values do not depend on it.
        if scaling == "learnable":
            model.scale = LongSkipScale(_LEVELS * _DEPTH, kind="learnable", channels=_WIDTH)
        elif scaling != "none":
            model.scale = LongSkipScale(_LEVELS * _DEPTH, kind=scaling, kappa=kappa)
    return model


def _norm(model: nn.Module) -> float:
    squares = [p.grad.square().sum() for p in model.parameters() if p.grad is not None]
    return to_scalar(torch.stack(squares).sum().sqrt())


def long_skips(
    seed: int, *, scaling: str = "none", kappa: float = 0.5, lr: float = 0.01, steps: int = 200
) -> dict[str, float]:
    """Train a UNet to predict the noise, by Adam at a constant rate, and return how steadily and how fast it learns.

    `loss` is the held-out squared error of the noise at the end, `steps_to_target` the first step at which it is at
    most that of unscaled models (the number of steps if never). `feature_oscillation` is the mean change of the root
    mean square of the last hidden feature, on held-out images, from one measurement to the next, and
    `gradient_oscillation` that of the gradient's norm from step to step.

    Args:
        seed: of the initial weights, batches, times and noise.
        scaling: of the long skips: `"none"`, `"constant"`, `"learnable"` or `"sqrt2"`.
        kappa: base of the constant coefficients.
        lr: learning rate.
        steps: how many.
    """
    choose("scaling", scaling, _SCALINGS)
    train, test = _images()
    model = _model(seed, scaling, kappa)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    x0, t = test[:_HELD_OUT], torch.linspace(0.002, 0.998, _HELD_OUT)
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
    held_out, levels, norms, reached = [], [], [], steps
    for step in range(steps + 1):
        if step % _EVERY == 0:
            with torch.no_grad():
                feature = model.features(_noisy(x0, t, noise), t)
                held_out.append(to_scalar(F.mse_loss(model.outlet(F.silu(feature)), noise)))
                levels.append(to_scalar(feature.square().mean().sqrt()))
            if held_out[-1] <= _TARGET:
                reached = min(reached, step)
        if step == steps or not math.isfinite(held_out[-1]):
            break
        images, times, epsilon = _draw(train, seed, step)
        optimizer.zero_grad()
        F.mse_loss(model(_noisy(images, times, epsilon), times), epsilon).backward()
        norms.append(_norm(model))
        optimizer.step()
    diverged = not math.isfinite(held_out[-1])
    return {
        "loss": held_out[0] if diverged else min(held_out[-1], held_out[0]),
        "steps_to_target": float(steps if diverged else reached),
        "feature_oscillation": _oscillation(levels),
        "gradient_oscillation": _oscillation(norms),
    }


def _oscillation(values: list[float]) -> float:
    """Return the mean change from one value to the next, of the finite ones."""
    finite = [value for value in values if math.isfinite(value)]
    return statistics.fmean(abs(b - a) for a, b in pairwise(finite)) if len(finite) > 1 else 0.0


def weighting(seed: int, *, weight: str = "uniform", lr: float = 0.01, steps: int = 200) -> dict[str, float]:
    """Train a UNet to predict the image under a weighting of times, and return how good its samples are.

    `frechet` is the Fréchet distance of 256 samples (25 deterministic steps) from the held-out images, over pixels;
    `loss` the held-out squared error of the image without weights, and `gradient_spread` the standard deviation of the
    loss gradient's norm over ten times, relative to its mean: the mean of three measurements during training.

    Args:
        seed: of the initial weights, batches, times, noise and samples.
        weight: `"uniform"`, `"clipped"` to [0.05, 1.5], or `"min-snr"`.
        lr: first learning rate.
        steps: how many.
    """
    choose("weight", weight, _WEIGHTS)
    train, test = _images()
    model = _model(seed, "none", 1.0)
    minimum, maximum = (0.0, 5.0) if weight == "min-snr" else (0.05, 1.5)
    spreads: list[float] = []

    def loss_of(images: Tensor, times: Tensor, noise: Tensor) -> Tensor:
        predicted = model(_noisy(images, times, noise), times)
        if weight == "uniform":
            return F.mse_loss(predicted, images)
        alpha_bar = _alpha_bar(times)
        return clipped_snr_loss(predicted, images, alpha_bar / (1 - alpha_bar), minimum=minimum, maximum=maximum)

    def spread() -> float:
        norms = []
        for time in torch.linspace(0.05, 0.95, 10):
            images, _, noise = _draw(train, seed, 0)
            model.zero_grad()
            loss_of(images, time.expand(_BATCH), noise).backward()
            norms.append(_norm(model))
        # At most 3: that is one time with all of the gradient, among ten.
        return statistics.pstdev(norms) / statistics.fmean(norms) if math.isfinite(sum(norms)) and any(norms) else 3.0

    def loss_at(step: int) -> Tensor:
        if step and step % max(1, steps // 3) == 0 and len(spreads) < 2:
            spreads.append(spread())
            model.zero_grad()
        return loss_of(*_draw(train, seed, step))

    losses = fit(model.parameters(), loss_at, steps=steps, lr=lr)
    if not math.isfinite(losses[-1]):
        return {"frechet": _frechet(torch.zeros(256, 64), test.flatten(1)), "loss": 1.0, "gradient_spread": 3.0}
    spreads.append(spread())
    with torch.no_grad():
        x0, t = test[:_HELD_OUT], torch.linspace(0.002, 0.998, _HELD_OUT)
        noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
        error = to_scalar(F.mse_loss(model(_noisy(x0, t, noise), t), x0))
        samples = _sample(model, seed)
    return {
        "frechet": _frechet(samples.flatten(1), test.flatten(1)),
        "loss": error,
        "gradient_spread": statistics.fmean(spreads),
    }


def _sample(model: _UNet, seed: int, count: int = 256, steps: int = 25) -> Tensor:
    """Return samples by DDIM without noise, from a model that predicts the image."""
    x = torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed + 7))
    times = torch.linspace(0.998, 0.002, steps + 1)
    for t, s in pairwise(times):
        x0 = model(x, t.expand(count)).clamp(-1, 1)
        a, b = _alpha_bar(t), _alpha_bar(s)
        noise = (x - a.sqrt() * x0) / (1 - a).sqrt()
        x = b.sqrt() * x0 + (1 - b).sqrt() * noise
    return x


def _frechet(left: Tensor, right: Tensor) -> float:
    """Return |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) of two sets of vectors."""
    (m1, c1), (m2, c2) = ((x.mean(0), torch.cov(x.mT)) for x in (left.double(), right.double()))
    values, vectors = torch.linalg.eigh(c1)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.mT
    cross = torch.linalg.eigvalsh(root @ c2 @ root).clamp(min=0).sqrt().sum()
    return to_scalar((m1 - m2).square().sum() + c1.trace() + c2.trace() - 2 * cross)
