"""Representations learned without labels, judged by a linear probe: joint embeddings and dense contrast."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.losses import dense_contrastive_loss, lejepa_loss
from trimtab.scalars import to_scalar
from trimtab.studies._fitting import fit, minibatch
from trimtab.workloads import workload

_SIDE = 8
_WORST = 1e6  # of a prediction error


def joint_embedding(
    seed: int, *, weight: float = 0.05, steps: int = 300, lr: float = 0.003, views: int = 4
) -> dict[str, float]:
    """Train an encoder on augmented digits by LeJEPA and probe its embeddings.

    Args:
        seed: of the weights, the batches and the views.
        weight: lambda of SIGReg; at 0 prediction alone is left.
        steps: batches of 128; 0 leaves the encoder at its initialisation.
        lr: learning rate of the first step.
        views: of each image, all global.

    Returns:
        The test part's `accuracy` of a linear probe; the `rank` of its embeddings, the exponential of the entropy of
        their singular values (not centred: 1 where all are one point); and the last `prediction` error.
    """
    data = workload("digits-mlp").data
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = nn.Sequential(nn.Linear(_SIDE**2, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 16))
    draws = torch.Generator().manual_seed(seed)

    def embed(step: int) -> Tensor:
        images = data.train_inputs[minibatch(seed, step, 128, len(data.train_inputs))]
        return torch.stack([encoder(_augmented(images, draws)) for _ in range(views)])

    def loss_at(step: int) -> Tensor:
        return lejepa_loss(embed(step), step, weight=weight, slices=64)

    fit(encoder.parameters(), loss_at, steps=steps, lr=lr)
    with torch.no_grad():
        train, test = (_finite(encoder(inputs)) for inputs in (data.train_inputs, data.test_inputs))
        prediction = lejepa_loss(embed(steps), steps, weight=0.0).nan_to_num(nan=_WORST).clamp(max=_WORST)
        values = torch.linalg.svdvals(test.double())
        shares = values / values.sum().clamp(min=1e-300)
        rank = torch.special.entr(shares).sum().exp()
    right = _probed(train, data.train_targets, test, classes=10, steps=200) == data.test_targets
    return {
        "accuracy": to_scalar(right.double().mean()),
        "rank": to_scalar(rank),
        "prediction": to_scalar(prediction),
    }


def _finite(x: Tensor) -> Tensor:
    """Return embeddings, those of an encoder that diverged as 0."""
    return x.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


def _augmented(images: Tensor, generator: torch.Generator) -> Tensor:
    """Return images moved by up to a pixel each way, with noise and without a square of 3 x 3 pixels."""
    size = len(images)
    grid = F.pad(images.view(size, _SIDE, _SIDE), (1, 1, 1, 1), value=-1.0)
    place = torch.arange(_SIDE)
    top, left = torch.randint(3, (2, size, 1), generator=generator)
    rows, columns = (top + place).unsqueeze(2), (left + place).unsqueeze(1)
    moved = grid[torch.arange(size).view(-1, 1, 1), rows, columns]
    top, left = torch.randint(_SIDE - 2, (2, size, 1), generator=generator)
    hidden = ((place >= top) & (place < top + 3)).unsqueeze(2) & ((place >= left) & (place < left + 3)).unsqueeze(1)
    noise = 0.2 * torch.randn(moved.shape, generator=generator)
    return (torch.where(hidden, -1.0, moved) + noise).flatten(1)


def _probed(train: Tensor, labels: Tensor, test: Tensor, *, classes: int, steps: int) -> Tensor:
    """Return the classes that a linear classifier on frozen features gives to others.

    Features are standardised by those of the training part: their scale, which differs between arms, is no part of what
    they know.
    """
    mean, spread = train.mean(0), train.std(0).clamp(min=1e-12)
    train, test = (train - mean) / spread, (test - mean) / spread
    weight = torch.zeros(classes, train.shape[1], requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    fit([weight, bias], lambda _: F.cross_entropy(F.linear(train, weight, bias), labels), steps=steps, lr=0.03)
    return F.linear(test, weight, bias).argmax(-1)


def places(
    seed: int, *, weight: float = 0.5, steps: int = 150, lr: float = 0.003, queue: int = 1024
) -> dict[str, float]:
    """Train a small convolutional network on scenes of two digits by DenseCL and probe its features place by place.

    A scene is 16 x 16 pixels with noise, a digit in two of its four quadrants; a place is one of 8 x 8 cells, and its
    class that of the digit that covers it, or an eleventh for none.

    Args:
        seed: of the weights, the scenes and the views.
        weight: lambda of the dense part; at 0 the global contrast alone is left, as in MoCo.
        steps: batches of 32 scenes.
        lr: learning rate of the first step.
        queue: keys of earlier scenes.

    Returns:
        The `accuracy` of a linear probe of places in unseen scenes, the same of those with a digit as `digit_accuracy`,
        and the share of places `matched` to the same class in the other view at the end.
    """
    data = workload("digits-mlp").data
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = _Places()
    momentum = copy.deepcopy(network).requires_grad_(False)
    draws = torch.Generator().manual_seed(seed)
    keys = [torch.randn(queue, 32, generator=draws) for _ in range(2)]

    def loss_at(step: int) -> Tensor:
        images, _ = _scenes(data.train_inputs, data.train_targets, 32, draws)
        with torch.no_grad():
            for slow, fast in zip(momentum.parameters(), network.parameters(), strict=True):
                slow.lerp_(fast, 0.01)
            k, t, theirs = momentum(_jittered(images, draws))
        q, r, ours = network(_jittered(images, draws))
        loss = dense_contrastive_loss(q, k, r, t, ours, theirs, keys[0], keys[1], weight=weight)
        keys[0] = torch.cat([F.normalize(k, dim=1), keys[0]])[:queue]
        keys[1] = torch.cat([F.normalize(t.mean(2), dim=1), keys[1]])[:queue]
        return loss

    fit(network.parameters(), loss_at, steps=steps, lr=lr)
    # Scenes to judge by are the same whatever was trained.
    judge = torch.Generator().manual_seed(seed + 1)
    train, labels = _scenes(data.train_inputs, data.train_targets, 96, judge)
    test, answers = _scenes(data.test_inputs, data.test_targets, 64, judge)
    with torch.no_grad():
        rows, unseen = (network(x)[2].transpose(1, 2).flatten(0, 1) for x in (train, test))
        first, second = network(_jittered(test, judge))[2], network(_jittered(test, judge))[2]
        chosen = (F.normalize(first, dim=1).transpose(1, 2) @ F.normalize(second, dim=1)).argmax(-1)
        matched = answers.gather(1, chosen) == answers
    right = _probed(rows, labels.flatten(), unseen, classes=11, steps=100) == answers.flatten()
    digits = answers.flatten() < 10
    return {
        "accuracy": to_scalar(right.double().mean()),
        "digit_accuracy": to_scalar(right[digits].double().mean()),
        "matched": to_scalar(matched.double().mean()),
    }


class _Places(nn.Module):
    """A convolutional network with a global and a dense head; returns both embeddings and the features [B, C, S]."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 32, 3, padding=1),
            nn.ReLU(),
        )
        self.whole = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))
        self.dense = nn.Sequential(nn.Conv1d(32, 32, 1), nn.ReLU(), nn.Conv1d(32, 32, 1))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return global embeddings [B, D], dense ones [B, D, S] and features [B, C, S]."""
        features = self.features(images).flatten(2)
        return self.whole(features.mean(2)), self.dense(features), features


def _scenes(digits: Tensor, labels: Tensor, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return scenes [B, 1, 16, 16] of two digits and the class of each of their 8 x 8 places [B, 64]."""
    canvas = -torch.ones(size, 4, _SIDE, _SIDE)
    classes = torch.full((size, 4, _SIDE // 2, _SIDE // 2), 10)
    quadrants = torch.rand(size, 4, generator=generator).argsort(1)[:, :2]
    chosen = torch.randint(len(digits), (size, 2), generator=generator)
    rows = torch.arange(size).unsqueeze(1)
    canvas[rows, quadrants] = digits[chosen].view(size, 2, _SIDE, _SIDE)
    classes[rows, quadrants] = labels[chosen].view(size, 2, 1, 1).expand(-1, -1, _SIDE // 2, _SIDE // 2)

    def assembled(parts: Tensor) -> Tensor:
        side = parts.shape[-1]
        return parts.view(size, 2, 2, side, side).transpose(2, 3).reshape(size, 2 * side, 2 * side)

    return assembled(canvas).unsqueeze(1), assembled(classes).flatten(1)


def _jittered(scenes: Tensor, generator: torch.Generator) -> Tensor:
    """Return scenes with noise, another contrast and brightness; their places stay where they are."""
    shape = (len(scenes), 1, 1, 1)
    contrast = 0.6 + 0.8 * torch.rand(shape, generator=generator)
    brightness = 0.4 * torch.randn(shape, generator=generator)
    return contrast * scenes + brightness + 0.3 * torch.randn(scenes.shape, generator=generator)
