"""muP's claim: the best learning rate of a narrow network is that of the wide ones; under the standard one it moves.

Networks of several widths are trained with Adam at each rate of a grid, with muP (the narrowest is the base) and in
the standard parametrisation. A run's loss is the mean training loss over its last tenth of steps, a run that diverged
counts with its first loss; an optimum is the rate of the lowest mean over seeds. `regret` is what a width loses by the
rate that was best for the narrowest: its loss there over its own best, minus 1.

Run: python benchmarks/mup.py [--workers 2] [--seeds 3]
Writes benchmarks/results/mup.json. About 10 minutes of CPU time; needs scikit-learn for the digits.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any, NamedTuple

import torch
from _common import one_thread, write

from trimtab.layers import apply_mup, mup_param_groups
from trimtab.scalars import to_scalar
from trimtab.workloads import workload


class Case(NamedTuple):
    """One network and how it is trained."""

    workload: str
    depth: int
    widths: tuple[int, ...]
    lrs: tuple[float, ...]
    steps: int
    batch_size: int


def _grid(low: float, high: float, per_decade: int) -> tuple[float, ...]:
    count = round(math.log10(high / low) * per_decade) + 1
    return tuple(low * 10 ** (place / per_decade) for place in range(count))


CASES = {
    "mlp": Case("digits-mlp", 3, (64, 128, 256, 512), _grid(1e-4, 1e-1, 4), 60, 64),
    "lm": Case("lm-small", 2, (32, 64, 128, 256), _grid(10**-3.5, 1e-1, 2), 40, 8),
}


def trained(job: tuple[str, str, int, float, int]) -> tuple[float, float]:
    """Train once; return the loss that counts and the CPU seconds."""
    name, parametrization, width, lr, seed = job
    one_thread()
    began = time.process_time()
    case = CASES[name]
    task = workload(case.workload)
    model = task.model(seed, width=width, depth=case.depth)
    parameters: Any = list(model.parameters())
    if parametrization == "mup":
        with torch.device("meta"):
            base = task.model(seed, width=case.widths[0], depth=case.depth)
        apply_mup(model, base)
        parameters = mup_param_groups(model, lr=lr)
    optimizer = torch.optim.Adam(parameters, lr=lr, betas=(0.9, task.defaults.beta2))
    losses = []
    for step in range(case.steps):
        inputs, targets = task.batch(seed, step, case.batch_size)
        optimizer.zero_grad()
        loss = task.loss(model(inputs), targets)
        losses.append(to_scalar(loss))
        if not math.isfinite(losses[-1]):
            break
        loss.backward()
        optimizer.step()
    last = statistics.fmean(losses[-max(1, case.steps // 10) :])
    whole = len(losses) == case.steps and math.isfinite(last)
    return min(last, losses[0]) if whole else losses[0], time.process_time() - began


def summary(case: Case, losses: dict[tuple[str, int, float, int], float], seeds: Sequence[int]) -> dict[str, Any]:
    """Return curves, optima and regrets of both parametrisations."""
    found: dict[str, Any] = {"setting": case._asdict()}
    for kind in ("mup", "standard"):
        curves = {
            width: [statistics.fmean(losses[kind, width, lr, seed] for seed in seeds) for lr in case.lrs]
            for width in case.widths
        }
        best = {width: min(range(len(case.lrs)), key=curve.__getitem__) for width, curve in curves.items()}
        first = best[case.widths[0]]
        by_seed = [
            [min(case.lrs, key=lambda lr: losses[kind, width, lr, seed]) for width in case.widths] for seed in seeds
        ]
        moved = [math.log10(case.lrs[place] / case.lrs[first]) for place in best.values()]
        found[kind] = {
            "mean_loss": curves,
            "optimum": {width: case.lrs[place] for width, place in best.items()},
            "optimum_by_seed": by_seed,
            "decades_moved": dict(zip(case.widths, moved, strict=True)),
            "largest_move": max(moved, key=abs),
            "on_the_edge": [width for width, place in best.items() if place in (0, len(case.lrs) - 1)],
            "regret": {width: curve[first] / min(curve) - 1 for width, curve in curves.items()},
        }
    found["mup_within_half_a_decade"] = abs(found["mup"]["largest_move"]) <= 0.5 + 1e-9
    found["standard_moves_further"] = abs(found["standard"]["largest_move"]) > abs(found["mup"]["largest_move"])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--cases", default=",".join(CASES))
    options = parser.parse_args()
    seeds = range(options.seeds)
    result: dict[str, Any] = {"seeds": options.seeds}
    with ProcessPoolExecutor(options.workers, mp_context=get_context("spawn")) as pool:
        for name in options.cases.split(","):
            case = CASES[name]
            plan = [
                (name, kind, width, lr, seed)
                for width in reversed(case.widths)
                for kind in ("mup", "standard")
                for lr in case.lrs
                for seed in seeds
                # At the base's width both are one and the same.
                if kind == "mup" or width != case.widths[0]
            ]
            outcomes = dict(zip(plan, pool.map(trained, plan, chunksize=1), strict=True))
            losses = {job[1:]: loss for job, (loss, _) in outcomes.items()}
            losses |= {("standard", *key[1:]): loss for key, loss in losses.items() if key[1] == case.widths[0]}
            result[name] = {
                **summary(case, losses, seeds),
                "cpu_seconds": sum(seconds for _, seconds in outcomes.values()),
            }
            for kind in ("mup", "standard"):
                entry = result[name][kind]
                shown = ", ".join(f"{width}: {lr:.2g}" for width, lr in entry["optimum"].items())
                regret = ", ".join(f"{value:.1%}" for value in entry["regret"].values())
                print(f"{name} {kind}: optimum {shown}; regret {regret}; edge {entry['on_the_edge']}")
            print(f"{name}: {result[name]['cpu_seconds']:.0f} CPU seconds", flush=True)
            write("mup", result)


if __name__ == "__main__":
    main()
