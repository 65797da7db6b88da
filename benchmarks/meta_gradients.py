"""Bootstrapped meta-gradients against ordinary ones at equal unrolls, and against tuned fixed rates.

Toy: y = <x, w*_t> + noise, one stream of batches. w* drifts slowly for a while and then jumps about, in turns, so that
no fixed rate is right throughout; what counts is the mean squared distance |w - w*|^2 before each step. Step sizes of
the meta-learners and the fixed rate are those of the lowest distance on seeds that are not compared. All arms train on
the same stream. Digits: plain SGD from a rate that is 30 times too small, test loss after 400 steps.

Run: python benchmarks/meta_gradients.py [--seeds 6]
Writes benchmarks/results/meta_gradients.json. Needs scikit-learn for the digits.
"""

from __future__ import annotations

import argparse
import math
import statistics
from typing import Any

import torch
from _common import one_thread, write
from torch import Tensor, nn

from trimtab.compare import paired
from trimtab.errors import RunFailedError
from trimtab.tune.bilevel.bootstrapped_meta import BootstrappedMetaLR
from trimtab.workloads import workload

SIZE, BATCH, NOISE, PHASE, STEPS = 10, 8, 1.0, 250, 1000
DRIFTS = (0.003, 0.1)
"""Standard deviation of each step of w*, in the slow and the fast phases."""
RATES = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4)
META_RATES = (0.03, 0.1, 0.3)
TUNING_SEEDS = (100, 101)
ARMS: dict[str, dict[str, Any]] = {
    "meta-gradient, K=2": {"K": 2, "L": 1, "metric": "loss"},
    "bootstrapped, K=2, L=4": {"K": 2, "L": 4, "metric": "parameters"},
    "bootstrapped, K=2, L=10": {"K": 2, "L": 10, "metric": "parameters"},
}
PAIRS = (
    ("meta-gradient, K=2", "bootstrapped, K=2, L=4"),
    ("meta-gradient, K=2", "bootstrapped, K=2, L=10"),
)


def stream(seed: int) -> tuple[list[tuple[Tensor, Tensor]], list[Tensor]]:
    """Return the batches and the w* that each was drawn with."""
    generator = torch.Generator().manual_seed(seed)
    truth, batches, truths = torch.zeros(SIZE), [], []
    for step in range(STEPS):
        truth = truth + DRIFTS[step // PHASE % 2] * torch.randn(SIZE, generator=generator)
        x = torch.randn(BATCH, SIZE, generator=generator)
        y = x @ truth + NOISE * torch.randn(BATCH, generator=generator)
        batches.append((x, y[:, None]))
        truths.append(truth)
    return batches, truths


def squared(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return 0.5 * (model(batch[0]) - batch[1]).square().mean()


def tracked(seed: int, *, lr: float, meta_lr: float, **options: Any) -> dict[str, float]:
    """Return the mean distance over the stream, and the rates at the ends of the slow and the fast phases."""
    batches, truths = stream(seed)
    model = nn.Linear(SIZE, 1, bias=False)
    with torch.no_grad():
        model.weight.zero_()
    distances: list[float] = []

    def loss(net: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return squared(net, batch)

    tuner = BootstrappedMetaLR(model, loss, lr=lr, meta_lr=meta_lr, **options)
    taken = tuner.K + tuner.L - 1
    rates: dict[str, list[float]] = {"slow": [], "fast": []}
    place = 0
    while place + taken < STEPS:
        # Only the first weights of a round are seen here; the drift makes the others alike.
        distances.append(float((model.weight.detach()[0] - truths[place]).square().sum()))
        try:
            rate = tuner.step(batches[place : place + taken + 1]).lr
        except RunFailedError:
            return {"distance": math.inf, "slow": math.nan, "fast": math.nan}
        if place % PHASE > PHASE // 2:
            rates[("slow", "fast")[place // PHASE % 2]].append(rate)
        place += taken
    return {"distance": statistics.fmean(distances), **{name: statistics.median(v) for name, v in rates.items()}}


def tracked_fixed(seed: int, lr: float) -> dict[str, float]:
    """Return the same for a fixed rate."""
    w, distances = torch.zeros(SIZE), []
    for (x, y), truth in zip(*stream(seed), strict=True):
        distances.append(float((w - truth).square().sum()))
        w = w - lr * x.T @ (x @ w - y[:, 0]) / BATCH
    return {"distance": statistics.fmean(distances), "slow": lr, "fast": lr}


def toy(seeds: int) -> dict[str, Any]:
    def score(**options: Any) -> float:
        return statistics.fmean(tracked(seed, **options)["distance"] for seed in TUNING_SEEDS)

    fixed = {lr: statistics.fmean(tracked_fixed(seed, lr)["distance"] for seed in TUNING_SEEDS) for lr in RATES}
    lr = min(fixed, key=fixed.__getitem__)
    arms: dict[str, dict[str, Any]] = {"fixed, tuned": {"lr": lr}}
    runs = {"fixed, tuned": [tracked_fixed(seed, lr) for seed in range(seeds)]}
    for name, options in ARMS.items():
        scores = {meta_lr: score(lr=lr, meta_lr=meta_lr, **options) for meta_lr in META_RATES}
        arms[name] = {"lr": lr, "meta_lr": min(scores, key=scores.__getitem__), **options}
        runs[name] = [tracked(seed, **arms[name]) for seed in range(seeds)]
    values = {name: [run["distance"] for run in rows] for name, rows in runs.items()}
    result: dict[str, Any] = {"fixed_lr": lr, "arms": {}, "pairs": {}}
    for name, options in arms.items():
        result["arms"][name] = {
            **options,
            "mean": statistics.fmean(values[name]),
            "values": values[name],
            "lr_slow": statistics.fmean(run["slow"] for run in runs[name]),
            "lr_fast": statistics.fmean(run["fast"] for run in runs[name]),
            "against_fixed": paired(values["fixed, tuned"], values[name]).to_json(),
        }
        against = result["arms"][name]["against_fixed"]
        facts = [round(result["arms"][name][key], 4) for key in ("mean", "lr_slow", "lr_fast")]
        print(name, *facts, against["verdict"], against["mean"], flush=True)
    for ordinary, bootstrapped in PAIRS:
        found = paired(values[ordinary], values[bootstrapped])
        result["pairs"][f"{bootstrapped} against {ordinary}"] = found.to_json()
        print(f"{bootstrapped} against {ordinary}: {found.mean:+.4f} {found}", flush=True)
    return result


def digits(seeds: int, steps: int = 400) -> dict[str, Any]:
    task = workload("digits-mlp")
    task.prepare()

    def run(seed: int, lr: float, meta_lr: float, **options: Any) -> tuple[float, float]:
        model = task.model(seed)
        if not options:
            optimizer = torch.optim.SGD(model.parameters(), lr=lr)
            for step in range(steps):
                inputs, targets = task.batch(seed, step, 64)
                optimizer.zero_grad()
                task.loss(model(inputs), targets).backward()
                optimizer.step()
            return task.evaluate(model)["loss"], lr
        tuner = BootstrappedMetaLR(
            model, lambda net, batch: task.loss(net(batch[0]), batch[1]), lr=lr, meta_lr=meta_lr, **options
        )
        taken, place = tuner.K + tuner.L - 1, 0
        try:
            while place + taken <= steps:
                tuner.step([task.batch(seed, place + step, 64) for step in range(taken + 1)])
                place += taken
        except RunFailedError:
            return math.inf, tuner.lr
        return task.evaluate(model)["loss"], tuner.lr

    scores = {lr: statistics.fmean(run(seed, lr, 0.0)[0] for seed in TUNING_SEEDS) for lr in (0.1, 0.2, 0.4, 0.8)}
    best = min(scores, key=scores.__getitem__)
    arms: dict[str, tuple[float, dict[str, Any]]] = {
        "fixed, tuned": (best, {}),
        "fixed, a thirtieth": (best / 30, {}),
    }
    arms["meta-gradient, K=2"] = (best / 30, {"K": 2, "L": 1, "metric": "loss"})
    arms["bootstrapped, K=2, L=4, softmax"] = (best / 30, {"K": 2, "L": 4, "metric": "softmax"})
    result: dict[str, Any] = {"steps": steps, "arms": {}}
    for name, (lr, options) in arms.items():
        scores = {
            meta_lr: statistics.fmean(run(seed, lr, meta_lr, **options)[0] for seed in TUNING_SEEDS)
            for meta_lr in ((0.1, 0.3) if options else ())
        }
        meta_lr = min(scores, key=scores.__getitem__) if options else 0.0
        rows = [run(seed, lr, meta_lr, **options) for seed in range(seeds)]
        values = [row[0] for row in rows]
        entry = {"lr": lr, "meta_lr": meta_lr, **options, "mean": statistics.fmean(values), "values": values}
        entry["final_lr"] = [row[1] for row in rows]
        result["arms"][name] = entry
        others = {other: found["values"] for other, found in result["arms"].items() if other != name}
        entry["against"] = {other: paired(before, values).to_json() for other, before in others.items()}
        print(name, meta_lr, round(entry["mean"], 4), [round(row[1], 3) for row in rows], flush=True)
        for other, found in entry["against"].items():
            print(f"   against {other}: {found['verdict']} {found['mean']}", flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=6)
    asked = parser.parse_args()
    one_thread()
    result = {"toy": toy(asked.seeds)}
    print(write("meta_gradients", result), flush=True)
    result["digits-mlp"] = digits(min(5, asked.seeds))
    write("meta_gradients", result)


if __name__ == "__main__":
    main()
