"""Training-free ranking on a table of small networks: RoBoT against single scores and random search.

The table: 48 networks for the 8 x 8 digits (MLPs and CNNs of several depths, widths, activations, with and without
batch normalisation, and with initial weights scaled up or down), each trained for 150 steps of Adam at 0.003. A
network's value is its validation accuracy. Three tables differ in split, initial weights and batches; on each the
sampler runs with 20 seeds. Reported for each budget: the regret, best value of the table minus best value found,
against random search (its exact expectation) and against training the first of each single score; and the rank
correlation of the combined score with the values of the networks that were not trained.

Run: python benchmarks/training_free.py [--tables 3] [--seeds 20]
Writes benchmarks/results/training_free.json. Needs scikit-learn.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from _common import one_thread, write
from scipy.stats import spearmanr
from sklearn.datasets import load_digits
from torch import nn

from trimtab.tune import RobotSampler, training_free_scores

SCORES = ("grad_norm", "snip", "grasp", "fisher", "synflow", "jacov", "naswot", "ntk")
PAPER = SCORES[:6]
BUDGETS = (6, 10, 15)
ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh}


def mlp(depth: int, width: int, activation: str, gain: float = 1.0) -> nn.Sequential:
    parts: list[nn.Module] = []
    for fan_in in (64, *[width] * (depth - 1)):
        parts += [nn.Linear(fan_in, width), ACTIVATIONS[activation]()]
    model = nn.Sequential(*parts, nn.Linear(width, 10))
    for parameter in model.parameters():
        parameter.data *= gain
    return model


def cnn(depth: int, channels: int, activation: str, norm: bool) -> nn.Sequential:
    parts: list[nn.Module] = [nn.Unflatten(1, (1, 8, 8))]
    for layer in range(depth):
        parts.append(nn.Conv2d(channels if layer else 1, channels, 3, padding=1))
        parts += [nn.BatchNorm2d(channels)] if norm else []
        parts.append(ACTIVATIONS[activation]())
        parts += [nn.MaxPool2d(2)] if layer == 0 else []
    return nn.Sequential(*parts, nn.Flatten(), nn.Linear(channels * 16, 10))


def candidates() -> dict[str, Callable[[], nn.Module]]:
    found: dict[str, Callable[[], nn.Module]] = {}
    for depth, width, act in itertools.product((1, 2, 3), (8, 32, 128), ACTIVATIONS):
        found[f"mlp {depth}x{width} {act}"] = lambda d=depth, w=width, a=act: mlp(d, w, a)
    for depth, gain in itertools.product((1, 3), (0.2, 2.0, 5.0)):
        found[f"mlp {depth}x32 relu gain {gain}"] = lambda d=depth, g=gain: mlp(d, 32, "relu", g)
    for depth, channels, act, norm in itertools.product((1, 2, 3), (4, 16), ACTIVATIONS, (False, True)):
        name = f"cnn {depth}x{channels} {act}{' bn' if norm else ''}"
        found[name] = lambda d=depth, c=channels, a=act, n=norm: cnn(d, c, a, n)
    return found


def table(seed: int) -> tuple[np.ndarray, np.ndarray, dict[str, float]]:
    """Return scores [N, M], values [N] and what both took."""
    bunch = load_digits()
    order = np.random.default_rng(seed).permutation(len(bunch.data))
    x = torch.tensor(bunch.data[order], dtype=torch.float32) / 8 - 1
    y = torch.tensor(bunch.target[order])

    def seeded(build: Callable[[], nn.Module]) -> nn.Module:
        torch.manual_seed(seed)
        return build()

    start = time.process_time()
    builds = [lambda build=build: seeded(build) for build in candidates().values()]
    scores = training_free_scores(builds, x[:32], y[:32], F.cross_entropy, scores=SCORES)
    scored = time.process_time()
    values = []
    for build in candidates().values():
        model, generator = seeded(build), torch.Generator().manual_seed(seed)
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        for _ in range(150):
            chosen = torch.randint(900, (64,), generator=generator)
            optimizer.zero_grad()
            F.cross_entropy(model(x[chosen]), y[chosen]).backward()
            optimizer.step()
        model.eval()
        with torch.no_grad():
            values.append(float((model(x[900:]).argmax(1) == y[900:]).float().mean()))
    return scores, np.array(values), {"scores": scored - start, "trainings": time.process_time() - scored}


def chance(values: np.ndarray, budget: int) -> float:
    """Expected best of `budget` networks drawn without replacement."""
    n = len(values)
    return sum(v * math.comb(k, budget - 1) for k, v in enumerate(np.sort(values))) / math.comb(n, budget)


def search(scores: np.ndarray, values: np.ndarray, budget: int, seed: int) -> tuple[float, float]:
    """Return the best value found, and the combined score's rank correlation over the networks not trained."""
    sampler = RobotSampler(scores, budget=budget, seed=seed)
    while (candidate := sampler.ask()) is not None:
        sampler.tell(candidate, values[candidate])
    rest = [i for i in range(len(values)) if i not in sampler.told]
    combined = sampler.combined[rest]
    correlation = spearmanr(combined, values[rest]).statistic if np.ptp(combined) > 0 else 0.0
    return max(sampler.told.values()), float(correlation)


def single(column: np.ndarray, values: np.ndarray, budget: int) -> float:
    """Return the best value among the first of one score."""
    return float(values[np.argsort(-np.nan_to_num(column, nan=-np.inf), kind="stable")[:budget]].max())


def compare(scores: np.ndarray, values: np.ndarray, seeds: int, names: tuple[str, ...]) -> dict[str, Any]:
    columns = [SCORES.index(name) for name in names]
    best, row = float(values.max()), {}
    for budget in BUDGETS:
        found = [search(scores[:, columns], values, budget, seed) for seed in range(seeds)]
        row[str(budget)] = {
            "robot": best - statistics.mean(value for value, _ in found),
            "robot_sd": statistics.stdev(value for value, _ in found),
            "random": best - chance(values, budget),
            "single": {name: best - single(scores[:, SCORES.index(name)], values, budget) for name in names},
            "rank_correlation": statistics.mean(correlation for _, correlation in found),
        }
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tables", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=20)
    options = parser.parse_args()
    one_thread()
    tables = []
    for seed in range(options.tables):
        scores, values, cpu = table(seed)
        correlations = {
            name: float(spearmanr(scores[:, m], values, nan_policy="omit").statistic) for m, name in enumerate(SCORES)
        }
        row = {
            "best": float(values.max()),
            "median": float(np.median(values)),
            "cpu_seconds": cpu,
            "rank_correlation_of_single_scores": correlations,
            "six scores of the paper": compare(scores, values, options.seeds, PAPER),
            "all eight scores": compare(scores, values, options.seeds, SCORES),
            "values": dict(zip(candidates(), values.tolist(), strict=True)),
        }
        tables.append(row)
        print(seed, {k: round(v, 2) for k, v in correlations.items()}, cpu)
        for names in ("six scores of the paper", "all eight scores"):
            for budget, r in row[names].items():
                singles = r["single"].values()
                print(
                    f"  {names}, {budget}: regret robot {r['robot']:.4f}, random {r['random']:.4f}, single best "
                    f"{min(singles):.4f} mean {statistics.mean(singles):.4f}; correlation {r['rank_correlation']:.2f}"
                )
    print(write("training_free", {"networks": len(candidates()), "tables": tables}))


if __name__ == "__main__":
    main()
