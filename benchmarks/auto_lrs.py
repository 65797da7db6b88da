"""AutoLRS against schedules chosen beforehand, at equal steps with those of its search counted; its forecasts' errors.

The constant rate is that of the lowest test loss over two seeds that are not compared; the workload's default rate is
that of such a sweep with its own schedule. Differences are paired by
seed, with 95 % intervals. Ranks: in each seed's first stage every rate that was tried also trains the whole stage.

Run: python benchmarks/auto_lrs.py [--seeds 5] [--lm-steps 120]
Writes benchmarks/results/auto_lrs.json. Needs scikit-learn.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable
from typing import Any

import torch
from _common import one_thread, write
from scipy.stats import spearmanr

from trimtab.compare import paired
from trimtab.tune.lr._snapshot import trial
from trimtab.tune.lr.auto_lrs import AutoLRS
from trimtab.workloads import Workload, workload
from trimtab.workloads.session import Session
from trimtab.workloads.workload import evaluating, seeded

LR_MIN, LR_MAX = 1e-4, 1e-1
TUNING_SEEDS = (100, 101)


def session(task: Workload, seed: int, **changes: Any) -> Session:
    return Session(task, task.defaults.replace(seed=seed, **changes), {})


def final(task: Workload, model: torch.nn.Module) -> dict[str, float]:
    """Return the test loss, and the loss on (a part of) the training set."""
    data = task.data
    part = slice(0, 1024)
    with evaluating(model):
        inputs, targets = data.train_inputs[part], data.train_targets[part]
        if not inputs.is_floating_point():
            inputs, targets = inputs.long(), targets.long()
        train = float(task.loss(model(inputs), targets))
    return {"test": task.evaluate(model)["loss"], "train": train}


def scheduled(task: Workload, seed: int, steps: int, **changes: Any) -> dict[str, Any]:
    with seeded(seed):
        run = session(task, seed, steps=steps, **changes)
        for _ in range(steps):
            run.step(None, None)
            run.at.step += 1
    return final(task, run.model)


def tuner_of(task: Workload, seed: int, tau: int, **options: Any) -> AutoLRS:
    run = session(task, seed)
    size = run.settings.batch_size
    return AutoLRS(
        run.model,
        run.optimizer,
        lambda model, batch: run.loss(model(batch[0]), batch[1]),
        lambda step: task.batch(seed, step, size),
        lr_min=LR_MIN,
        lr_max=LR_MAX,
        tau=tau,
        clip=run.settings.clip,
        seed=seed,
        **options,
    )


def auto(task: Workload, seed: int, steps: int, tau: int, **options: Any) -> dict[str, Any]:
    with seeded(seed):
        tuner = tuner_of(task, seed, tau, **options)
        tuner.train(steps)
    stages = [
        {"tau": stage.tau, "lr": stage.lr, "forecast": stage.forecast, "reached": stage.reached}
        for stage in tuner.stages
    ]
    return {**final(task, tuner.model), "search_steps": tuner.search_steps, "stages": stages}


def ranks(task: Workload, seed: int, tau: int) -> dict[str, Any]:
    """Return how the forecasts of a first stage rank its rates, and those that a trial's last loss alone would give."""
    with seeded(seed):
        tuner = tuner_of(task, seed, tau)
        tuner.train(2 * tau)
        stage = tuner.stages[0]
        truth, last = [], []
        for lr in stage.lrs:
            again = tuner_of(task, seed, tau)
            again.model.train()
            with trial(again.model, again.optimizer, loader=None):
                again._set_lr(lr)
                losses = [again._loss_of_step(again._taken()) for _ in range(tau)]
            truth.append(statistics.fmean(losses[-10:]) if math.isfinite(sum(losses)) else 1e3)
            last.append(losses[stage.tau_trial - 1])
    forecasts = [1e3 if value is None else value for value in stage.forecasts]
    chosen = truth[stage.lrs.index(stage.lr)]
    return {
        "spearman": float(spearmanr(forecasts, truth).statistic),
        "spearman_of_last_loss": float(spearmanr(last, truth).statistic),
        "median_error": statistics.median(f - t for f, t in zip(forecasts, truth, strict=True)),
        "chosen_minus_best": chosen - min(truth),
    }


def errors(runs: list[dict[str, Any]]) -> dict[str, float]:
    """Return the errors of the forecasts of the rates that were chosen."""
    found = [
        stage["reached"] - stage["forecast"] for run in runs for stage in run["stages"] if stage["forecast"] is not None
    ]
    return {"n": len(found), "median": statistics.median(found), "median_size": statistics.median(map(abs, found))}


def experiment(name: str, steps: int, seeds: int, tau: int, grid: tuple[float, ...]) -> dict[str, Any]:
    task = workload(name)
    task.prepare()
    arms: dict[str, Callable[[int], dict[str, Any]]] = {
        "cosine, default rate": lambda seed: scheduled(task, seed, steps),
        "autolrs": lambda seed: auto(task, seed, steps, tau),
    }
    chosen = {}
    if grid:
        scores = {
            lr: statistics.fmean(
                scheduled(task, seed, steps, lr=lr, schedule="constant")["test"] for seed in TUNING_SEEDS
            )
            for lr in grid
        }
        best = chosen["constant"] = min(scores, key=scores.__getitem__)
        arms["constant, tuned rate"] = lambda seed: scheduled(task, seed, steps, lr=best, schedule="constant")
        arms["autolrs, search not counted"] = lambda seed: auto(task, seed, 2 * steps, tau)
    runs = {arm: [run(seed) for seed in range(seeds)] for arm, run in arms.items()}
    result: dict[str, Any] = {"steps": steps, "tau": tau, "tuned_lr": chosen, "arms": {}}
    for arm, rows in runs.items():
        entry: dict[str, Any] = {}
        for kind in ("test", "train"):
            values = [row[kind] for row in rows]
            entry[kind] = {"mean": statistics.fmean(values), "values": values}
            if arm.startswith("autolrs"):
                entry[kind]["against"] = {
                    other: paired([row[kind] for row in runs[other]], values).to_json()
                    for other in runs
                    if not other.startswith("autolrs")
                }
        if arm.startswith("autolrs"):
            entry |= {"search_steps": rows[0]["search_steps"], "forecast_errors": errors(rows)}
            entry["stages"] = [row["stages"] for row in rows]
        result["arms"][arm] = entry
        print(name, arm, {kind: round(entry[kind]["mean"], 4) for kind in ("test", "train")}, flush=True)
        for kind in ("test", "train") if arm.startswith("autolrs") else ():
            for other, found in entry[kind]["against"].items():
                print(f"   {kind} against {other}: {found['verdict']} {found['mean']:+.4f}", flush=True)
    if grid:
        result["ranks"] = [ranks(task, seed, 100) for seed in range(seeds)]
        print(result["ranks"], flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--lm-steps", type=int, default=120)
    asked = parser.parse_args()
    one_thread()
    result = {"digits-mlp": experiment("digits-mlp", 800, asked.seeds, 100, (0.0003, 0.001, 0.003, 0.01))}
    print(write("auto_lrs", result), flush=True)
    if asked.lm_steps:
        result["lm-small"] = experiment("lm-small", asked.lm_steps, asked.seeds, 60, ())
        write("auto_lrs", result)


if __name__ == "__main__":
    main()
