"""The convex bound of schedules against measured losses: order of schedules, and transfer of the learning rate.

Run: python benchmarks/convex_bound.py [--out FOLDER] [--workers 2]
Writes benchmarks/results/convex_bound.json; runs that are already in FOLDER are not repeated.

Fixed before any run: `lm-small` in batches of 8, seven learning rates from 1e-3 to 1e-1 (a third of a decade apart),
seeds 0 and 1, warm-up over a twentieth of the steps. A schedule's best rate is the vertex of the parabola through the
lowest mean loss over log rate and its two neighbours; where the lowest is at the grid's edge, there is none.

- Order: five schedules of 400 steps, each at the best rate of the grid, against their least bounds.
- Transfer between schedules: the ratio of best rates to that of the shortest cooldown, against the bound's ratio.
- Transfer to longer runs: the same for runs of 100 to 800 steps with a fifth of cooldown, from the run of 100.

The bound has G = 1; D does not matter to ratios. Errors are in decades, predicted over measured.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
from pathlib import Path
from typing import Any

from _common import one_thread, write
from scipy.stats import spearmanr

from trimtab.compare import Arm, log_grid, sweep
from trimtab.compare.lr_sweep import Curve
from trimtab.schedule import optimal_base_lr, transferred_base_lr
from trimtab.workloads import workload

WORKLOAD = "lm-small"
GRID = log_grid("1e-3:1e-1", 7)
SEEDS = (0, 1)
STEPS = 400
HORIZONS = (100, 200, 400, 800)
COMMON = "batch_size=8,warmup=0.05"
COOLDOWN = "schedule=wsd,schedule.form=linear,schedule.decay=0.2"
SCHEDULES = {
    "cooldown over a tenth": "schedule=wsd,schedule.form=linear,schedule.decay=0.1",
    "cooldown over a fifth": COOLDOWN,
    "cooldown over half": "schedule=wsd,schedule.form=linear,schedule.decay=0.5",
    "linear": "schedule=linear",
    "cosine": "schedule=cosine,schedule.floor=0",
    "constant": "schedule=constant",
}


def best_rate(curve: Curve) -> float | None:
    """Return the vertex of the parabola through the lowest mean loss and its neighbours, over log10 of the rate."""
    losses, logs = curve.mean_losses, [math.log10(lr) for lr in curve.lrs]
    place = min(range(len(losses)), key=losses.__getitem__)
    if place in (0, len(losses) - 1):
        return None
    left, middle, right = losses[place - 1 : place + 2]
    step = logs[place] - logs[place - 1]
    return 10 ** (logs[place] + 0.5 * step * (left - right) / (left - 2 * middle + right))


def factors(arm: Arm) -> list[float]:
    """Return the factors of an arm's learning rate, without those at the end that are 0."""
    settings = arm.settings.replace(lr=1.0)
    eta = [settings.learning_rate(step) for step in range(settings.steps)]
    return eta[: max(place for place, value in enumerate(eta, 1) if value > 0)]


def transfer(arms: list[Arm], rates: list[float | None]) -> list[dict[str, Any]]:
    """Return, for every arm, its best rate as measured and as the bound predicts from the first arm's."""
    first = rates[0]
    if first is None:
        return []
    found = []
    for arm, rate in zip(arms[1:], rates[1:], strict=True):
        predicted = transferred_base_lr(first, factors(arms[0]), factors(arm))
        error = None if rate is None else math.log10(predicted / rate)
        unchanged = None if rate is None else math.log10(first / rate)
        found.append(
            {
                "arm": arm.label,
                "predicted": predicted,
                "measured": rate,
                "error_in_decades": error,
                "error_if_kept": unchanged,
            }
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/convex-bound"))
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    one_thread()
    defaults = workload(WORKLOAD).defaults
    arms = [
        Arm(name, Arm.parse(f"{text},{COMMON},steps={STEPS}", defaults).settings) for name, text in SCHEDULES.items()
    ]
    longer = [
        Arm(f"{steps} steps", Arm.parse(f"{COOLDOWN},{COMMON},steps={steps}", defaults).settings) for steps in HORIZONS
    ]
    curves: dict[str, Curve] = {}
    for arm in [*arms, *longer]:
        found = sweep(WORKLOAD, GRID, folder=options.out, arms=[arm], seeds=SEEDS, workers=options.workers)
        curves[arm.label] = found.curves[0]
        lr, loss = found.curves[0].best
        print(f"{arm.label:24} best of the grid {lr:g}: {loss:.4f}", flush=True)
    bounds = [optimal_base_lr(factors(arm)).bound for arm in arms]
    losses = [curves[arm.label].best[1] for arm in arms]
    pairs = list(itertools.combinations(range(len(arms)), 2))
    agree = sum((bounds[i] - bounds[j]) * (losses[i] - losses[j]) > 0 for i, j in pairs)
    result: dict[str, Any] = {
        "grid": GRID,
        "seeds": SEEDS,
        "order": [
            {"schedule": arm.label, "bound": bound, "loss": loss, "means": curves[arm.label].mean_losses}
            for arm, bound, loss in zip(arms, bounds, losses, strict=True)
        ],
        "order_spearman": float(spearmanr(bounds, losses).statistic),
        "order_pairs_agreeing": f"{agree} of {len(pairs)}",
        "between_schedules": transfer(arms, [best_rate(curves[arm.label]) for arm in arms]),
        "longer": transfer(longer, [best_rate(curves[arm.label]) for arm in longer]),
        "longer_losses": {arm.label: curves[arm.label].mean_losses for arm in longer},
    }
    for name in ("between_schedules", "longer"):
        for key in ("error_in_decades", "error_if_kept"):
            errors = [abs(entry[key]) for entry in result[name] if entry[key] is not None]
            result[f"{name}_mean_{key}"] = statistics.fmean(errors) if errors else None
    print(write("convex_bound", result))


if __name__ == "__main__":
    main()
