"""What clipping, flatness and a few more optimizers claim, on scikit-learn's digits at a size that a test affords."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from trimtab.optim import (
    SAM,
    TAG,
    AdamW,
    Chain,
    PerpGradSGD,
    Ranger21,
    ScheduleFreeAdamW,
    adaptive_clip,
    per_example_gradients,
    sharpness,
    winsorized_mean,
)
from trimtab.scalars import to_scalar


@functools.cache
def _digits():
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    return torch.tensor(digits.data, dtype=torch.float32)[order] / 16, torch.tensor(digits.target)[order]


def _mlp(width, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))


def _accuracy(model, x, y):
    with torch.no_grad():
        return to_scalar((model(x).argmax(1) == y).float().mean())


def _noisy(count, fraction, seed=0):
    """The first digits with some labels moved to another class, and which."""
    generator = torch.Generator().manual_seed(seed)
    y = _digits()[1][:count].clone()
    wrong = torch.rand(count, generator=generator) < fraction
    y[wrong] = (y[wrong] + torch.randint(1, 10, (int(wrong.sum()),), generator=generator)) % 10
    return y, wrong


@pytest.mark.parametrize("seed", [0, 1])
def test_perp_grad_stops_the_growth_of_logits(seed):
    x, y = (part[:200] for part in _digits())
    growth, accuracy = {}, {}
    for name, build in {"sgd": torch.optim.SGD, "perp": PerpGradSGD}.items():
        model = _mlp(64, seed)
        optimizer = build(model.parameters(), lr=0.1, momentum=0.9)
        sizes = {}
        for step in range(301):
            logits = model(x)
            sizes[step] = to_scalar(logits.detach().abs().mean())
            optimizer.zero_grad()
            F.cross_entropy(logits, y).backward()
            optimizer.step()
        growth[name], accuracy[name] = sizes[300] / sizes[100], _accuracy(model, x, y)
    assert min(accuracy.values()) > 0.97
    assert growth["sgd"] > 1.1
    assert growth["perp"] < 1.02


def test_adaptive_clipping_survives_a_spike():
    x, y = _digits()
    after = {}
    for name, stages in {"plain": [], "clipped": [adaptive_clip(clip_factor=0.02)]}.items():
        model = _mlp(64)
        optimizer = Chain(model.parameters(), stages, lr=0.3 if stages else 0.1)
        generator = torch.Generator().manual_seed(0)
        losses = []
        for step in range(200):
            rows = torch.randint(0, 1000, (32,), generator=generator)
            optimizer.zero_grad()
            (F.cross_entropy(model(x[rows]), y[rows]) * (1000 if step == 199 else 1)).backward()
            losses.append(to_scalar(F.cross_entropy(model(x), y)))
            optimizer.step()
        after[name] = to_scalar(F.cross_entropy(model(x), y)) - losses[-1]
    assert after["plain"] > 10
    assert abs(after["clipped"]) < 0.1


def test_sam_ends_where_the_loss_is_flatter():
    """With labels of which 30 % are wrong: SAM memorises few of them, generalises better, and is flatter."""
    x, y = _digits()
    noisy, wrong = _noisy(300, 0.3)
    memorised, accuracy, sharp = {}, {}, {}
    for name in ("sgd", "sam"):
        model = _mlp(64)
        base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        optimizer = base if name == "sgd" else SAM(base, rho=0.5)
        generator = torch.Generator().manual_seed(0)
        for _ in range(300):
            rows = torch.randint(0, 300, (64,), generator=generator)

            def closure(model=model, optimizer=optimizer, rows=rows):
                optimizer.zero_grad()
                loss = F.cross_entropy(model(x[rows]), noisy[rows])
                loss.backward()
                return loss

            optimizer.step(closure)
        memorised[name] = _accuracy(model, x[:300][wrong], noisy[wrong])
        accuracy[name] = _accuracy(model, x[600:], y[600:])
        sharp[name] = sharpness(
            lambda model=model: F.cross_entropy(model(x[:300]), noisy), list(model.parameters()), rho=0.2
        )
    assert memorised["sam"] < 0.3 * memorised["sgd"]
    assert accuracy["sam"] > accuracy["sgd"] + 0.05
    assert sharp["sam"] < 0.5 * sharp["sgd"]


def test_winsorized_gradients_memorise_fewer_wrong_labels():
    x, y = _digits()
    noisy, wrong = _noisy(300, 0.25)
    memorised, accuracy = {}, {}
    for c in (0, 8):
        model = _mlp(32)
        # What is clipped off makes steps shorter: both learning rates fit nearly all right labels.
        optimizer = torch.optim.SGD(model.parameters(), lr=0.3 if c else 0.1, momentum=0.9)
        generator = torch.Generator().manual_seed(0)
        for _ in range(300):
            rows = torch.randperm(300, generator=generator)[:100]
            gradients = per_example_gradients(model, F.cross_entropy, x[rows], noisy[rows])
            for name, mean in winsorized_mean(gradients, c=c).items():
                model.get_parameter(name).grad = mean
            optimizer.step()
        assert _accuracy(model, x[:300][~wrong], noisy[~wrong]) > 0.85
        memorised[c] = _accuracy(model, x[:300][wrong], noisy[wrong])
        accuracy[c] = _accuracy(model, x[600:], y[600:])
    assert memorised[8] < 0.3 * memorised[0]
    assert accuracy[8] > accuracy[0]


def _stream(lr, seed, tasks=4, b=None):
    """Train on permuted digits, one permutation and head after another; return mean accuracy and forgetting."""
    x, y = _digits()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        body = nn.Sequential(nn.Linear(64, 64), nn.ReLU())
        heads = nn.ModuleList(nn.Linear(64, 10) for _ in range(tasks))
    pixels = [torch.randperm(64, generator=torch.Generator().manual_seed(10 + task)) for task in range(tasks)]
    params = [*body.parameters(), *heads.parameters()]
    optimizer = torch.optim.RMSprop(params, lr=lr) if b is None else TAG(params, lr=lr, tasks=tasks, b=b)
    generator = torch.Generator().manual_seed(seed)

    def accuracy(task):
        return _accuracy(nn.Sequential(body, heads[task]), x[1000:, pixels[task]], y[1000:])

    learned = []
    for task in range(tasks):
        if b is not None:
            optimizer.set_task(task)
        for _ in range(60):
            rows = torch.randint(0, 1000, (32,), generator=generator)
            optimizer.zero_grad()
            F.cross_entropy(heads[task](body(x[rows][:, pixels[task]])), y[rows]).backward()
            optimizer.step()
        learned.append(accuracy(task))
    final = [accuracy(task) for task in range(tasks)]
    forgotten = sum(before - after for before, after in zip(learned, final, strict=True)) / (tasks - 1)
    return torch.tensor([sum(final) / tasks, forgotten])


def test_tag_forgets_less_than_rmsprop():
    """At the learning rate at which each is best."""
    rmsprop = [torch.stack([_stream(lr, seed) for seed in range(2)]).mean(0) for lr in (1e-3, 3e-3, 1e-2)]
    accuracy, forgetting = max(rmsprop, key=lambda result: result[0])
    tag = torch.stack([_stream(1e-3, seed, b=5.0) for seed in range(2)]).mean(0)
    assert tag[0] > accuracy + 0.01
    assert tag[1] < 0.5 * forgetting


def _test_loss(name, lr, seed=0, steps=300):
    x, y = _digits()
    model = _mlp(64, seed)
    build = {
        "cosine": lambda params: AdamW(params, lr=lr, weight_decay=0.01),
        "schedule-free": lambda params: ScheduleFreeAdamW(params, lr=lr, weight_decay=0.01),
        "ranger21": lambda params: Ranger21(params, lr=lr, total_steps=steps),
    }[name]
    optimizer = build(model.parameters())
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps) if name == "cosine" else None
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        rows = torch.randint(0, 1000, (32,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
        if scheduler:
            scheduler.step()
    if name == "schedule-free":
        optimizer.eval()
    with torch.no_grad():
        return to_scalar(F.cross_entropy(model(x[1000:]), y[1000:]))


def test_schedule_free_is_as_good_as_a_schedule():
    cosine = min(_test_loss("cosine", lr) for lr in (1e-2, 3e-2))
    free = min(_test_loss("schedule-free", lr) for lr in (1e-2, 3e-2))
    assert free < 1.1 * cosine


def test_ranger21_is_as_good_as_adamw_on_a_cosine():
    cosine = min(_test_loss("cosine", lr) for lr in (1e-2, 3e-2, 1e-1))
    ranger = min(_test_loss("ranger21", lr) for lr in (1e-2, 3e-2, 1e-1))
    assert ranger < 1.1 * cosine
