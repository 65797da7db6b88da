"""What a trial of a tuning costs beyond its training, against bare Optuna with the same objective and sampler.

Run: python benchmarks/tune_overhead.py [--trials 30] [--repetitions 5]
Writes benchmarks/results/tune_overhead.json. The bound: below 50 ms a trial, by the wall clock and by CPU time, each
judged by itself; the machine's load is written beside them.

Both sides train `tabular` for the same few steps with the default watch, one after the other in this process. Bare
Optuna keeps its study in memory; ours writes the journal, takes and hands in each trial under a lock, draws by trial
seeds, and has the doctor examine every record. The sides take turns.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
from _common import one_thread, write

from trimtab.tune import tune
from trimtab.workloads import train, workload

STEPS = 30
LOW, HIGH = 1e-3, 1e-1


def bare(folder: Path, trials: int, seed: int) -> list[float]:
    """Tune with Optuna alone; return its results."""
    job = workload("tabular")

    def objective(trial: optuna.Trial) -> float:
        lr = trial.suggest_float("lr", LOW, HIGH, log=True)
        decay = trial.suggest_float("weight_decay", 0.0, 0.3)
        settings = job.defaults.replace(lr=lr, weight_decay=decay, steps=STEPS)
        return train(job, settings, out=folder / f"trial-{trial.number}").loss

    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed))
    study.optimize(objective, n_trials=trials)
    return [float(trial.value) for trial in study.trials if trial.value is not None]


def ours(folder: Path, trials: int, seed: int) -> list[float]:
    """Tune with trimtab; return its results."""
    space = {"lr": f"{LOW}:{HIGH}:log", "weight_decay": "0:0.3"}
    found = tune("tabular", space, trials=trials, folder=folder, seed=seed, steps=STEPS)
    return [trial.value for trial in found.trials if trial.value is not None]


def measure(trials: int, repetitions: int) -> dict[str, Any]:
    """Return wall and CPU milliseconds a trial of both sides, and how much more ours takes."""
    sides: dict[str, Callable[[Path, int, int], list[float]]] = {"optuna": bare, "trimtab": ours}
    times: dict[str, dict[str, list[float]]] = {name: {"wall": [], "cpu": []} for name in sides}
    for side in sides.values():
        with tempfile.TemporaryDirectory() as folder:
            side(Path(folder), 3, 0)
    load = os.getloadavg()[0]
    for repetition in range(repetitions):
        for name in sides if repetition % 2 == 0 else reversed(sides):
            with tempfile.TemporaryDirectory() as folder:
                wall, cpu = time.perf_counter(), time.process_time()
                results = sides[name](Path(folder), trials, repetition)
                times[name]["wall"].append(1000 * (time.perf_counter() - wall) / trials)
                times[name]["cpu"].append(1000 * (time.process_time() - cpu) / trials)
                if len(results) != trials:
                    raise RuntimeError(f"{name} gave {len(results)} results for {trials} trials")
    result: dict[str, Any] = {"trials": trials, "repetitions": repetitions, "steps": STEPS, "bound_ms": 50}
    for clock in ("wall", "cpu"):
        more = [a - b for a, b in zip(times["trimtab"][clock], times["optuna"][clock], strict=True)]
        result[f"{clock}_ms_per_trial"] = {name: statistics.median(times[name][clock]) for name in sides}
        result[f"{clock}_ms_overhead"] = {"median": statistics.median(more), "low": min(more), "high": max(more)}
    result["load"] = {"before": load, "after": os.getloadavg()[0], "cores": os.cpu_count()}
    result["met"] = {clock: result[f"{clock}_ms_overhead"]["median"] < result["bound_ms"] for clock in ("wall", "cpu")}
    return result


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--trials", type=int, default=30)
    parser.add_argument("--repetitions", type=int, default=5)
    options = parser.parse_args()
    one_thread()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    result = measure(options.trials, options.repetitions)
    print(result)
    print(write("tune_overhead", result))


if __name__ == "__main__":
    main()
