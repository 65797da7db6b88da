"""The fair comparison: optimizers against AdamW and SGD, everyone tuned over 40 points on each of seven small tasks.

Run: python benchmarks/bench_table.py [--arms lion,radam] [--out FOLDER] [--workers 1] [--summary]
Writes benchmarks/results/bench_NAME.json as each contender ends (its runs), and from all of them bench.json (verdicts,
speed-ups, performance profiles). Contenders with a file are not measured again; runs in FOLDER are not repeated.
--summary only rewrites bench.json.

Fixed before any run: the protocol of trimtab.bench, and the arms below. Low-rank projections have rank 8 and a new
subspace each 50 steps, as the matrices are small and the runs short; Muon's steps are scaled to AdamW's size, so that
one range of learning rates fits all its parameters. About ten CPU-minutes a contender at AdamW's cost a step.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from pathlib import Path
from typing import Any

from _common import RESULTS, one_thread, write

from trimtab.bench import BASELINES, FULL, SUITE, Budget, Contender, Measured, judge, profiles
from trimtab.bench.protocol import measure, runner
from trimtab.compare import Progress
from trimtab.compare.store import strict
from trimtab.record.environment import environment

ARMS = (
    "lion",
    "radam",
    "spam",
    "stable-spam",
    "schedule-free",
    "muon,scale=match_rms_adamw,other_lr=1",
    "came",
    "ranger21",
    "galore,rank=8,update_gap=50",
    "fira,rank=8,update_gap=50",
    "perp-grad",
    "frugal,update_gap=50",
    "adamw-scale",
    "shampoo",
    "root",
)
NAME = "bench"
DIGITS = 6


def path_of(arm: str) -> Path:
    """Return where a contender's measurements are kept."""
    return RESULTS / f"{NAME}_{re.sub(r'[^a-z0-9]+', '-', arm.partition(',')[0])}.json"


def rounded(value: Any) -> Any:
    """Return plain data with its floats at six digits: more are noise, and committed."""
    if isinstance(value, dict):
        return {key: rounded(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(entry) for entry in value]
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value


def keep(measured: Measured, seconds: float) -> None:
    """Write a contender's measurements, a line for each task."""
    data = rounded(strict(measured.to_json()))
    lines = ",\n".join(json.dumps(result) for result in data.pop("results"))
    head = json.dumps({"kind": "bench-contender", "environment": environment(), "wall_seconds": round(seconds), **data})
    path_of(measured.contender.arm).write_text(f'{head[:-1]}, "results": [\n{lines}\n]}}\n', encoding="utf-8")


def known() -> dict[str, Measured]:
    """Return every contender measured so far, baselines first, by arm."""
    found = {}
    for arm in (*BASELINES, *ARMS):
        if path_of(arm).exists():
            found[arm] = Measured.from_json(json.loads(path_of(arm).read_text(encoding="utf-8")))
    return found


def summary(measured: dict[str, Measured]) -> dict[str, Any]:
    """Return what the measurements say."""
    baselines = {arm: measured[arm] for arm in BASELINES}
    rows = []
    for arm, found in measured.items():
        judgements = [judge(found, base, SUITE).to_json() for name, base in baselines.items() if name != arm]
        rows.append(
            {
                "arm": arm,
                "baseline": arm in BASELINES,
                "judgements": judgements if arm != BASELINES[0] else [],
                "lr_range": list(found.contender.lr),
                "left_out": found.left_out,
                "tasks": [
                    {key: value for key, value in result.to_json().items() if key not in ("points", "runs")}
                    | {"tuning_points": len(result.points), "seeds": len(result.runs)}
                    for result in found.results.values()
                ],
            }
        )
    return {
        "protocol": FULL.name,
        "budget": vars(FULL).copy(),
        "tasks": [{**vars(task), "changes": dict(task.changes)} for task in SUITE],
        "contenders": rows,
        "profiles": {unit: profiles(measured, SUITE, cpu=unit == "cpu") for unit in ("steps", "cpu")},
    }


def teller(arm: str) -> Any:
    """Return a progress callback that says a line each minute."""
    last = [0.0]

    def tell(progress: Progress) -> None:
        if time.monotonic() - last[0] > 60 or progress.note:
            last[0] = time.monotonic()
            print(f"{arm}: {progress.done}/{progress.total} {progress.note}", flush=True)

    return tell


def main() -> None:
    """Measure what is missing and write the summary after each contender."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", default="", help="names of optimizers, joined by commas; all")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder of the runs")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--summary", action="store_true", help="measure nothing, only rewrite bench.json")
    given = parser.parse_args()
    one_thread()
    chosen = [name for name in given.arms.split(",") if name]
    arms = [arm for arm in ARMS if not chosen or arm.partition(",")[0] in chosen]
    measured = known()
    for arm in () if given.summary else (*BASELINES, *arms):
        if arm in measured:
            continue
        began = time.monotonic()
        run = runner(given.out, workers=given.workers, progress=teller(arm))
        reference = measured.get(BASELINES[0])
        found = measure(Contender.parse(arm), SUITE, FULL, run, seeds=_seeds(arm, FULL), reference=reference)
        keep(found, time.monotonic() - began)
        measured = known()
        print(f"{arm}: {time.monotonic() - began:.0f} s", flush=True)
        if set(BASELINES) <= set(measured):
            write(NAME, summary(measured))
    if set(BASELINES) <= set(measured):
        print(f"written: {write(NAME, summary(measured))}")


def _seeds(arm: str, budget: Budget) -> int:
    return budget.baseline_seeds if arm in BASELINES else budget.seeds


if __name__ == "__main__":
    main()
