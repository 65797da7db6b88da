"""Population based training against random search at equal total steps: the best of 8 members, by test loss.

Run: nice python benchmarks/pbt.py [--workload digits-mlp] [--seeds 5] [--members 8] [--steps 400] [--interval 20]
Writes benchmarks/results/pbt.json; it reports, it has no bound.

Random search trains the same members (seeds and first learning rates) without exploit and explore, once at a constant
rate as PBT does, once with the workload's own warm-up and cosine. Each seed is a pair: PBT against random search. The
best of 8 is chosen on the part it is scored on, in all arms alike.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from typing import Any

from trimtab.compare import paired
from trimtab.tune.population._exploit import initial
from trimtab.tune.population.population_based import train_population
from trimtab.tune.search.space import Range
from trimtab.workloads import train, workload

SPACES = {"wide": Range(1e-5, 1.0, log=True), "narrow": Range(1e-3, 3e-2, log=True)}


def measure(name: str, space: Range, seed: int, members: int, steps: int, interval: int) -> dict[str, Any]:
    """Return the best final loss of each arm for one seed."""
    job = workload(name)
    cosine = job.defaults.replace(steps=steps, seed=1000 * seed)
    constant = cosine.replace(schedule="constant", warmup=0.0)
    found: dict[str, Any] = {}
    began = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        population = train_population(
            job, {"lr": space}, folder=folder, settings=constant, members=members, interval=interval, workers=0
        )
    best = population.records[population.best]
    found["pbt"] = best[-1]["score"]
    found["pbt_schedule"] = [row["hyperparameters"]["lr"] for row in population.schedule(population.best)]
    found["pbt_exploits"] = sum(record["action"] == "exploit" for known in population.records for record in known)
    found["pbt_cpu_seconds"] = time.process_time() - began
    for label, settings in (("constant", constant), ("cosine", cosine)):
        began = time.process_time()
        losses = []
        for member in range(members):
            lr = initial({"lr": space}, (settings.seed, member, 0))["lr"]
            losses.append(train(job, settings.replace(lr=lr, seed=settings.seed + member)).loss)
        found[label] = min(losses)
        found[f"{label}_cpu_seconds"] = time.process_time() - began
    return found


def main() -> int:
    """Measure, print and write."""
    from _common import one_thread, write

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--workload", default="digits-mlp")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--members", type=int, default=8)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--interval", type=int, default=20)
    arguments = parser.parse_args()
    one_thread()
    result: dict[str, Any] = {"workload": arguments.workload, "members": arguments.members, "steps": arguments.steps}
    for space, dimension in SPACES.items():
        rows = [
            measure(arguments.workload, dimension, seed, arguments.members, arguments.steps, arguments.interval)
            for seed in range(arguments.seeds)
        ]
        pbt = [row["pbt"] for row in rows]
        entry: dict[str, Any] = {"lr": str(dimension), "each": rows}
        for label in ("constant", "cosine"):
            other = [row[label] for row in rows]
            entry[f"against_{label}"] = paired(other, pbt).to_json()
            print(f"{space:7s} {label:9s} pbt {sum(pbt) / len(pbt):.4f} random {sum(other) / len(other):.4f}", end=" ")
            print(paired(other, pbt))
        result[space] = entry
    print(write("pbt", result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
