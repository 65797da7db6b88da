"""Rules without backpropagation against backpropagation: accuracy on digits, and what each rule's paper measures.

Every arm takes the optimizer and rate of the best accuracy on 200 validation samples (two seeds) from the same grid,
then trains the same net for the same epochs on five seeds; differences are paired, with 95 % intervals.

Run: python benchmarks/training_rules.py [--epochs 30] [--seeds 5]
Writes benchmarks/results/training_rules.json. Needs scikit-learn for the digits.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import time
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from _common import one_thread, write
from scipy import stats
from sklearn.datasets import load_digits
from torch import Tensor, nn

from trimtab.optim import (
    DirectFeedbackAlignment,
    ForwardForward,
    HiddenStates,
    TargetProjection,
    class_selectivity,
    hoyer_sparsity,
)

Factory = Callable[[list[nn.Parameter]], torch.optim.Optimizer]

GRID: dict[str, Factory] = {
    **{f"sgd {lr}": lambda p, lr=lr: torch.optim.SGD(p, lr=lr) for lr in (0.01, 0.05, 0.2, 0.5, 1.0, 2.0)},
    **{f"adam {lr}": lambda p, lr=lr: torch.optim.Adam(p, lr=lr) for lr in (0.001, 0.003, 0.01, 0.03)},
}
HINTON: dict[str, Factory] = {
    f"momentum sgd {lr}": lambda p, lr=lr: torch.optim.SGD(p, lr=lr, momentum=0.9, dampening=0.9, weight_decay=0.002)
    for lr in (0.005, 0.015, 0.05)
}


class Backpropagation:
    """The baseline, with the interface of a rule."""

    def __init__(self, model: nn.Sequential, optimizer: Factory) -> None:
        self.model, self.optimizer = model, optimizer(list(model.parameters()))

    def step(self, x: Tensor, y: Tensor) -> None:
        """Train on one batch."""
        self.optimizer.zero_grad()
        F.cross_entropy(self.model(x), y).backward()
        self.optimizer.step()

    @torch.no_grad()
    def predict(self, x: Tensor) -> Tensor:
        """Return the classes."""
        return self.model(x).argmax(dim=-1)


def mlp(seed: int, middle: int = 128, activation: type[nn.Module] = nn.Tanh) -> nn.Sequential:
    torch.manual_seed(seed)
    sizes = itertools.pairwise((64, 128, middle))
    hidden = [part for a, b in sizes for part in (nn.Linear(a, b), activation())]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(middle, 10))


def conv(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        *(nn.Unflatten(1, (1, 8)), nn.Conv2d(1, 16, 3, padding=1), nn.Tanh(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.Tanh(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(128, 10)),
    )


def rnn(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.RNN(8, 64, batch_first=True), HiddenStates(), nn.Linear(64, 10))


def goodness_net(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(74, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU())


ARMS: dict[str, tuple[Callable[[int, Factory], Any], str, dict[str, Factory]]] = {
    "mlp: backpropagation": (lambda s, o: Backpropagation(mlp(s), o), "", GRID),
    "mlp: direct feedback": (
        lambda s, o: DirectFeedbackAlignment(mlp(s), optimizer=o, seed=s),
        "mlp: backpropagation",
        GRID,
    ),
    "mlp: target projection": (
        lambda s, o: TargetProjection(mlp(s), 10, optimizer=o, seed=s),
        "mlp: backpropagation",
        GRID,
    ),
    "mlp: target projection, l1": (
        lambda s, o: TargetProjection(mlp(s), 10, optimizer=o, seed=s, loss="l1"),
        "mlp: backpropagation",
        GRID,
    ),
    "relu mlp: backpropagation": (lambda s, o: Backpropagation(mlp(s, activation=nn.ReLU), o), "", GRID),
    "relu mlp: forward-forward": (
        lambda s, o: ForwardForward(goodness_net(s), 10, place="before", optimizer=o, seed=s),
        "relu mlp: backpropagation",
        {**GRID, **HINTON},
    ),
    "relu mlp: forward-forward, norm": (
        lambda s, o: ForwardForward(
            goodness_net(s),
            10,
            place="before",
            optimizer=o,
            goodness="norm",
            normalize="l2",
            threshold=3,
            peer_normalization=0,
            seed=s,
        ),
        "relu mlp: backpropagation",
        GRID,
    ),
    "conv: backpropagation": (lambda s, o: Backpropagation(conv(s), o), "", GRID),
    "conv: direct feedback": (
        lambda s, o: DirectFeedbackAlignment(conv(s), optimizer=o, seed=s),
        "conv: backpropagation",
        GRID,
    ),
    "conv: target projection": (
        lambda s, o: TargetProjection(conv(s), 10, optimizer=o, seed=s),
        "conv: backpropagation",
        GRID,
    ),
    "rnn: backpropagation": (lambda s, o: Backpropagation(rnn(s), o), "", GRID),
    "rnn: target projection": (
        lambda s, o: TargetProjection(rnn(s), 10, optimizer=o, seed=s),
        "rnn: backpropagation",
        GRID,
    ),
    "rnn: target projection, step by step": (
        lambda s, o: TargetProjection(rnn(s), 10, optimizer=o, seed=s, through_time=False),
        "rnn: backpropagation",
        GRID,
    ),
}


def data() -> dict[str, tuple[Tensor, Tensor]]:
    bunch = load_digits()
    order = torch.randperm(len(bunch.target), generator=torch.Generator().manual_seed(0))
    x, y = torch.tensor(bunch.images, dtype=torch.float32)[order] / 16, torch.tensor(bunch.target)[order]
    return {"train": (x[:1097], y[:1097]), "validation": (x[1097:1297], y[1097:1297]), "test": (x[1297:], y[1297:])}


def train(rule: Any, sets: dict[str, tuple[Tensor, Tensor]], epochs: int, seed: int, on: str) -> float:
    """Train and return the accuracy on one of the sets."""
    x, y = sets["train"]
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for batch in torch.randperm(len(x), generator=generator).split(64):
            rule.step(x[batch], y[batch])
    x, y = sets[on]
    return float((rule.predict(x) == y).float().mean())


def interval(differences: list[float]) -> list[float]:
    """Return the mean of paired differences and its 95 % interval."""
    mean = statistics.mean(differences)
    half = float(stats.t.ppf(0.975, len(differences) - 1)) * statistics.stdev(differences) / math.sqrt(len(differences))
    return [mean, mean - half, mean + half]


def peak_bytes(step: Callable[[], object], model: nn.Module) -> int:
    """Return the most bytes of saved activations that are alive at once, without parameters."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    alive: dict[int, int] = {}
    peak = 0

    class Held:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor

    def pack(tensor: Tensor) -> Held:
        nonlocal peak
        held = Held(tensor)
        if tensor.untyped_storage().data_ptr() not in parameters:
            alive[id(held)] = tensor.numel() * tensor.element_size()
            weakref.finalize(held, alive.pop, id(held))
            peak = max(peak, sum(alive.values()))
        return held

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda held: held.tensor):
        step()
    return peak


def measures(rules: dict[str, list[Any]], sets: dict[str, tuple[Tensor, Tensor]]) -> dict[str, Any]:
    """Return what the papers measure: angles, sparsity and selectivity, memory."""
    x, y = sets["test"]
    found: dict[str, Any] = {}
    for name in ("mlp: direct feedback", "conv: direct feedback"):
        cosines = [rule.alignment(x, y) for rule in rules[name]]
        found[f"{name}, cosine by layer"] = [statistics.mean(layer) for layer in zip(*cosines, strict=True)]
    with torch.no_grad():
        for name in ("relu mlp: forward-forward", "relu mlp: forward-forward, norm", "relu mlp: backpropagation"):
            by_seed = []
            for rule in rules[name]:
                if isinstance(rule, ForwardForward):
                    layers = rule.hidden(x, y)
                else:
                    layers = [rule.model[:3](x), rule.model[:5](x)]
                by_seed.append([[float(hoyer_sparsity(a)), float(class_selectivity(a, y))] for a in layers])
            means = torch.tensor(by_seed).mean(dim=0).tolist()
            found[f"{name}, sparsity and selectivity by layer"] = means
    for kind in ("mlp", "conv", "rnn"):
        for arm in ("backpropagation", "target projection"):
            rule = rules[f"{kind}: {arm}"][0]
            found[f"{kind}: {arm}, peak saved bytes"] = peak_bytes(
                lambda rule=rule: rule.step(x[:64], y[:64]), rule.model
            )
    return found


def bottleneck(sets: dict[str, tuple[Tensor, Tensor]], epochs: int, seeds: int, optimizer: Factory) -> dict[str, Any]:
    """Return the alignment of the first layer and the accuracy, by the width of the layer above it."""
    table = {}
    for width in (1, 2, 4, 8, 32, 128):
        rows = []
        for seed in range(seeds):
            rule = DirectFeedbackAlignment(mlp(seed, width), optimizer=optimizer, seed=seed)
            accuracy = train(rule, sets, epochs, seed, "test")
            baseline = train(Backpropagation(mlp(seed, width), GRID["adam 0.003"]), sets, epochs, seed, "test")
            rows.append([rule.alignment(*sets["test"])[0], accuracy, baseline])
        columns = ("cosine of the first layer", "accuracy", "accuracy of backpropagation")
        table[str(width)] = dict(zip(columns, torch.tensor(rows).mean(dim=0).tolist(), strict=True))
    return table


def main() -> None:
    """Tune, measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--seeds", type=int, default=5)
    arguments = parser.parse_args()
    one_thread()
    sets, epochs, seeds = data(), arguments.epochs, range(arguments.seeds)
    accuracies: dict[str, list[float]] = {}
    rules: dict[str, list[Any]] = {}
    table: dict[str, Any] = {}
    for name, (build, baseline, grid) in ARMS.items():
        start = time.process_time()
        tuned = {
            label: statistics.mean(train(build(s, factory), sets, epochs, s, "validation") for s in (100, 101))
            for label, factory in grid.items()
        }
        best = max(tuned, key=lambda label: tuned[label])
        rules[name] = [build(seed, grid[best]) for seed in seeds]
        accuracies[name] = [
            train(rule, sets, epochs, seed, "test") for seed, rule in zip(seeds, rules[name], strict=True)
        ]
        table[name] = {"optimizer": best, "validation": tuned[best], "test": accuracies[name]}
        text = f"{name:38s} {best:20s} {statistics.mean(accuracies[name]):.4f}"
        if baseline:
            pairs = zip(accuracies[name], accuracies[baseline], strict=True)
            table[name]["difference"] = interval([a - b for a, b in pairs])
            text += "  {:+.4f} [{:+.4f}, {:+.4f}]".format(*table[name]["difference"])
        print(f"{text}  ({time.process_time() - start:.0f} s)", flush=True)
    found = measures(rules, sets)
    narrow = bottleneck(sets, epochs, arguments.seeds, GRID[table["mlp: direct feedback"]["optimizer"]])
    for key, value in [*found.items(), *narrow.items()]:
        print(key, value)
    result = {"epochs": epochs, "seeds": len(seeds), "arms": table, "measures": found, "narrow middle layer": narrow}
    print(write("training_rules", result))


if __name__ == "__main__":
    main()
