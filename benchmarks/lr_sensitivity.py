"""What QK-norm and sigma-reparam do to the learning-rate sensitivity of lm-small, by the sweep of Wortsman et al. 2023.

Run: python benchmarks/lr_sensitivity.py [--out FOLDER] [--workers 1] [--steps N] [--seeds 3] [--sigma-seeds 1]
Writes benchmarks/results/lr_sensitivity.json; runs that are already in FOLDER are not repeated.

Fixed before any run: lm-small at its own settings (1,000 steps), seven learning rates from 3e-4 to 3e-1 half a decade
apart, seeds 0 to 2 without remedy and with QK-norm, seed 0 with sigma-reparam. S is the mean over the grid of
min(l, l0) - l*, S+ the same from the best learning rate up; both are means over seeds with their spread, and the
differences are paired by seed. A run takes 30 to 60 CPU-seconds, so all of them 25 to 50 minutes.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

from _common import RESULTS, one_thread, write

from trimtab.compare import Curve, Sweep, log_grid, sweep
from trimtab.compare.store import strict

NAME = "lr_sensitivity"
WORKLOAD = "lm-small"
GRID = log_grid("3e-4:3e-1", 7)


def row(curve: Curve) -> dict[str, Any]:
    """Return a curve's sensitivities, its losses and its largest attention logits."""
    found = curve.sensitivities
    spread = {
        "S_sd": statistics.stdev(each.s for each in found) if len(found) > 1 else None,
        "S_plus_sd": statistics.stdev(each.s_plus for each in found) if len(found) > 1 else None,
    }
    lr, loss = curve.best
    return {
        "curve": curve.arm.label,
        "n": len(found),
        "S": curve.s,
        "S_plus": curve.s_plus,
        **spread,
        "best_lr": lr,
        "best_loss": loss,
        "by_seed": [each.to_json() for each in found],
        "losses": curve.losses,
        "mean_losses": curve.mean_losses,
        "diverged": [sum(outcome.diverged for outcome in outcomes) for outcomes in curve.outcomes],
        "largest_attention_logit": [
            max(outcome.mechanism["attention_max_logit"] for outcome in outcomes) for outcomes in curve.outcomes
        ],
    }


def main() -> None:
    """Run the sweeps and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs") / NAME)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--steps", type=int, default=None)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--sigma-seeds", type=int, default=1)
    parser.add_argument("--results", type=Path, default=RESULTS)
    given = parser.parse_args()
    one_thread()
    sweeps: list[Sweep] = []
    for remedy, seeds in (("qk-norm", given.seeds), ("sigma-reparam", given.sigma_seeds)):
        if not seeds:
            continue
        sweeps.append(
            sweep(
                WORKLOAD,
                GRID,
                folder=given.out,
                remedies=[[remedy]],
                seeds=seeds,
                steps=given.steps,
                workers=given.workers,
            )
        )
    result = {
        "workload": WORKLOAD,
        "lrs": GRID,
        "initial_loss": sweeps[0].curves[0].outcomes[0][0].initial_loss,
        "curves": [row(sweeps[0].curves[0]), *(row(each.curves[1]) for each in sweeps)],
        "pairs": [pair for each in sweeps for pair in each.to_json()["pairs"]],
        "cpu_seconds": sum(
            outcome.cpu_seconds_per_step * outcome.steps
            for each in sweeps
            for curve in (each.curves if each is sweeps[0] else each.curves[1:])
            for outcomes in curve.outcomes
            for outcome in outcomes
        ),
    }
    path = write(NAME, strict(result), folder=given.results)
    print(f"written: {path}")


if __name__ == "__main__":
    main()
