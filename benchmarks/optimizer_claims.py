"""The optimizers' claims as paired comparisons, with the learning rate tuned on both sides.

Run: python benchmarks/optimizer_claims.py [--claims spam,perp-grad] [--out FOLDER] [--workers 2]
Writes benchmarks/results/optimizer_claims.json, claim by claim; runs that are already in FOLDER are not repeated.

Fixed before any run: the settings below. Each arm's learning rate is the best of a grid of half decades for one seed of
its own (100), extended while the best is at an edge; both arms then train with seeds 0 to 4 at their own best rates.
Language models train for 300 steps of batch 8, so that all claims together take about an hour on two cores. Six
comparisons were added when the first results were known: spam-longer, as SPAM's first reset is at step 500;
stable-spam-without-spikes and root-without-outliers, as controls; perp-grad-at-the-default, as AdamW generalises at no
learning rate; radam-against-warm-up; and memory-galore, which has no run of its own.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _common import RESULTS, one_thread, write

from trimtab.compare import Arm, Comparison, compare, paired, sweep
from trimtab.compare.store import strict
from trimtab.compare.training import final_loss, prepared
from trimtab.record import Run
from trimtab.workloads import Outcome

GRID = (0.001, 0.003, 0.01, 0.03, 0.1)
WIDER = (1e-6, 3e-6, 1e-5, 3e-5, 1e-4, 3e-4, *GRID, 0.3, 1.0, 3.0, 10.0)
TUNING_SEED = 100
SPREAD_SEEDS = 3
NAME = "optimizer_claims"

SHORT = "steps=300,batch_size=8"
SPIKES = f"spikes=0.05,spike_scale=1000,{SHORT}"
LONG_SPIKES = "spikes=0.05,spike_scale=1000,steps=1200,batch_size=8"
OUTLIERS = f"outliers=0.001,spike_scale=100,{SHORT}"
RANK = "rank=16,update_gap=50"
LOW_MEMORY = (
    f"galore,{RANK},{SHORT}",
    f"fira,{RANK},{SHORT}",
    f"frugal,density=0.25,update_gap=50,{SHORT}",
)
MUON = "muon,scale=match_rms_adamw,other_lr=1"
COLD = f"beta2=0.999,warmup=0,{SHORT}"


@dataclass(frozen=True)
class Claim:
    """A comparison to run.

    Attributes:
        arms: texts without a learning rate; the first is the baseline.
        workload: its name.
        metric: what is tuned and compared.
        higher_is_better: whether more of it is better.
        reach: a value of `eval_accuracy` whose first step counts too, or None.
        spread: whether the whole grid is run with three seeds, for the sensitivity to the learning rate.
        tuned: whether the learning rate is tuned; otherwise it is the workload's own in all arms.
    """

    arms: tuple[str, ...]
    workload: str = "lm-small"
    metric: str = "loss"
    higher_is_better: bool = False
    reach: float | None = None
    spread: bool = False
    tuned: bool = True


CLAIMS = {
    "spam": Claim(tuple(f"{name},clip=0,{SPIKES}" for name in ("adamw", "spam", "stable-spam"))),
    "perp-grad": Claim(("adamw", "perp-grad"), "modadd-nodecay", "accuracy", True, reach=0.95),
    "spam-with-clipping": Claim(tuple(f"{name},clip=1,{SPIKES}" for name in ("adamw", "spam", "stable-spam"))),
    "root-adamw": Claim(tuple(f"{name},{OUTLIERS}" for name in ("adamw", "root", MUON))),
    "root-muon": Claim((f"{MUON},{OUTLIERS}", f"root,{OUTLIERS}")),
    "memory": Claim((f"adamw,{SHORT}", *LOW_MEMORY)),
    "memory-galore": Claim(LOW_MEMORY),
    "adamw-8bit": Claim((f"adamw,{SHORT}", f"adamw-8bit,{SHORT}")),
    "came": Claim((f"adamw,{SHORT}", f"came,{SHORT}")),
    "lion": Claim((f"adamw,{SHORT}", f"lion,{SHORT}")),
    "radam": Claim((f"adamw,{COLD}", f"radam,{COLD}")),
    "radam-spread": Claim((f"adamw,{COLD}", f"radam,{COLD}"), spread=True),
    "ranger21": Claim((f"adamw,{SHORT}", f"ranger21,{SHORT}")),
    "muon": Claim((f"adamw,{SHORT}", f"{MUON},{SHORT}")),
    "schedule-free": Claim((f"adamw,schedule=constant,{SHORT}", f"schedule-free,schedule=constant,{SHORT}")),
    "schedule-free-cosine": Claim((f"adamw,{SHORT}", f"schedule-free,schedule=constant,{SHORT}")),
    "ranger21-own-schedule": Claim((f"adamw,{SHORT}", f"ranger21,schedule=constant,warmup=0,{SHORT}")),
    "perp-grad-at-the-default": Claim(("adamw", "perp-grad"), "modadd-nodecay", "accuracy", True, 0.95, tuned=False),
    "stable-spam-without-spikes": Claim((f"adamw,{SHORT}", f"stable-spam,{SHORT}")),
    "root-without-outliers": Claim((f"{MUON},{SHORT}", f"root,{SHORT}")),
    "spam-longer": Claim(tuple(f"{name},clip=0,{LONG_SPIKES}" for name in ("adamw", "spam"))),
    "radam-against-warm-up": Claim((f"adamw,beta2=0.999,{SHORT}", f"radam,{COLD}")),
    "shampoo": Claim((f"adamw,{SHORT}", f"shampoo,{SHORT}")),
}


def with_lr(arm: str, lr: float) -> str:
    """Return an arm's text with a learning rate after its optimizer."""
    optimizer, _, rest = arm.partition(",")
    return ",".join(part for part in (optimizer, f"lr={lr:g}", rest) if part)


def score(claim: Claim, outcome: Outcome) -> tuple[float, float]:
    """Return what is minimised by tuning: the metric, and the loss among equals."""
    loss = final_loss(outcome)
    if claim.metric == "loss":
        return loss, loss
    value = 0.0 if outcome.diverged else outcome.metrics[claim.metric]
    return (-value if claim.higher_is_better else value), loss


def tune(claim: Claim, folder: Path, workers: int) -> list[dict[str, Any]]:
    """Return each arm's best learning rate and its curve."""
    defaults = prepared(claim.workload).defaults
    sides = [Arm.parse(arm, defaults) for arm in claim.arms]
    options: dict[str, Any] = {"folder": folder, "seeds": [TUNING_SEED], "workers": workers}
    found = [
        {lr: row[0] for lr, row in zip(curve.lrs, curve.outcomes, strict=True)}
        for curve in sweep(claim.workload, GRID, arms=sides, **options).curves
    ]
    tuned = []
    for arm, side, curve in zip(claim.arms, sides, found, strict=True):
        while True:
            best = min(curve, key=lambda lr: score(claim, curve[lr]))
            place = WIDER.index(best)
            missing = [lr for lr in WIDER[max(0, place - 1) : place + 2] if lr not in curve]
            if not missing:
                break
            for lr in missing:
                curve[lr] = sweep(claim.workload, [lr], arms=[side], **options).curves[0].outcomes[0][0]
        points = [
            {
                "lr": lr,
                "loss": final_loss(curve[lr]),
                "diverged": curve[lr].diverged,
                claim.metric: abs(score(claim, curve[lr])[0]),
            }
            for lr in sorted(curve)
        ]
        tuned.append({"arm": arm, "best_lr": best, "points": points})
    return tuned


def first_step(folder: Path, reach: float) -> float:
    """Return the step from which a run's held-out accuracy was at least `reach`, or infinity."""
    with Run(folder) as run:
        series = run.series("eval_accuracy")
        steps = [step + 1 for step, value in zip(series.steps, series.flat, strict=True) if value >= reach]
    return float(steps[0]) if steps else math.inf


def summary(claim: Claim, comparison: Comparison) -> dict[str, Any]:
    """Return what is kept of a comparison: values, verdicts, state and time."""
    arms: list[dict[str, Any]] = []
    for result in comparison.results:
        values = result.values(claim.metric, higher_is_better=claim.higher_is_better)
        arms.append(
            {
                "arm": result.arm.label,
                "values": values,
                "mean": statistics.fmean(values),
                "diverged": result.diverged,
                "cpu_ms_per_step": result.cpu_ms_per_step,
                "state_bytes_per_parameter": result.mechanism.get("state_bytes_per_parameter"),
                "mechanism": result.mechanism,
            }
        )
        if claim.reach is not None:
            arms[-1]["first_step"] = [
                first_step(Path(outcome.folder or ""), claim.reach) for outcome in result.outcomes
            ]
    state = comparison.paired("state_bytes_per_parameter")
    pairs = [
        {"arm": label, **pair.to_json(), "in_words": str(pair), "state": state[label].to_json()}
        for label, pair in comparison.pairs.items()
    ]
    found: dict[str, Any] = {"seeds": comparison.seeds, "arms": arms, "pairs": pairs}
    if claim.reach is not None:
        length = comparison.baseline.arm.settings.steps
        capped = [[min(step, length) for step in arm["first_step"]] for arm in arms]
        found["first_step"] = [paired(capped[0], steps).to_json() for steps in capped[1:]]
    return found


def measure(claim: Claim, folder: Path, workers: int) -> dict[str, Any]:
    """Tune both sides, compare them, and return the numbers."""
    tuned = tune(claim, folder, workers) if claim.tuned else []
    comparison = compare(
        claim.workload,
        [with_lr(entry["arm"], entry["best_lr"]) for entry in tuned] or claim.arms,
        folder=folder,
        workers=workers,
        metric=claim.metric,
        higher_is_better=claim.higher_is_better,
    )
    result = {
        "workload": claim.workload,
        "metric": claim.metric,
        "higher_is_better": claim.higher_is_better,
        "tuning": tuned,
        **summary(claim, comparison),
    }
    if claim.spread:
        defaults = prepared(claim.workload).defaults
        arms = [Arm.parse(arm, defaults) for arm in claim.arms]
        whole = sweep(claim.workload, GRID, arms=arms, seeds=SPREAD_SEEDS, folder=folder, workers=workers)
        result["spread"] = {
            "lrs": whole.lrs,
            "mean_losses": {curve.arm.label: curve.mean_losses for curve in whole.curves},
            "S": {curve.arm.label: curve.s for curve in whole.curves},
            "at_each_lr": [
                {"lr": lr, **paired(*(curve.losses[place] for curve in whole.curves)).to_json()}
                for place, lr in enumerate(whole.lrs)
            ],
            "pairs": {name: pair.to_json() for name, pair in next(iter(whole.pairs.values())).items()},
        }
    return result


def main() -> None:
    """Run the chosen claims and write each as it is done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--claims", default=",".join(CLAIMS), help="names, joined by commas")
    parser.add_argument("--out", type=Path, default=Path("runs/optimizer-claims"), help="folder of the runs")
    parser.add_argument("--workers", type=int, default=2)
    chosen = parser.parse_args()
    one_thread()
    path = RESULTS / f"{NAME}.json"
    done = json.loads(path.read_text(encoding="utf-8"))["result"] if path.exists() else {}
    for name in chosen.claims.split(","):
        done[name] = measure(CLAIMS[name], chosen.out, chosen.workers)
        write(NAME, strict({key: done[key] for key in CLAIMS if key in done}))
        for pair in done[name]["pairs"]:
            print(f"{name}: {pair['arm']}: {pair['in_words']}", flush=True)


if __name__ == "__main__":
    main()
