"""Cost of watching: CPU seconds per training step, watched over unwatched, one thread, interleaved in one process.

Run: python benchmarks/watch_cost.py [--workload lm-medium] [--repetitions 15]
Writes benchmarks/results/watch_cost.json. The bound is 1.05 (the goal 1.03) for the default watch on lm-medium.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable

import torch
from _common import interleaved, one_thread, ratio, write
from torch import nn

from trimtab.watch import Probe, Watch
from trimtab.watch.probes import default_probes
from trimtab.workloads import Workload, workload

PERIOD = 10
"""Steps measured at a time: one period of the default watch, so that each measurement holds one sampled step."""


def arm(job: Workload, probes: list[Probe] | None, folder: str) -> Callable[[], None]:
    """Return a function that trains the workload for one period; `probes` None is the unwatched run."""
    settings = job.defaults
    torch.manual_seed(settings.seed)
    model = job.model(settings.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr, betas=(settings.beta1, settings.beta2))
    watch = None if probes is None else Watch(model, optimizer, to=folder, every=PERIOD, probes=probes).start()
    count = 0

    def period() -> None:
        nonlocal count
        for _ in range(PERIOD):
            inputs, targets = job.batch(settings.seed, count, settings.batch_size)
            loss = job.loss(model(inputs), targets)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if watch is not None:
                watch.step(loss)
            count += 1

    return period


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workload", default="lm-medium")
    parser.add_argument("--repetitions", type=int, default=15)
    arguments = parser.parse_args()
    one_thread()
    job = workload(arguments.workload)
    job.prepare()
    # The loop as a user would write it synchronises once a step to see the loss; the unwatched arm does not even that.
    chosen: dict[str, list[Probe] | None] = {"unwatched": None, "default": default_probes(), "no probes": []}
    chosen |= {probe.name: [probe] for probe in default_probes()}
    with tempfile.TemporaryDirectory() as folder:
        arms = {name: arm(job, probes, f"{folder}/{name}") for name, probes in chosen.items()}
        seconds = interleaved(arms, repetitions=arguments.repetitions, warmup=1)
    result = {
        "workload": job.name,
        "parameters": sum(parameter.numel() for parameter in job.model(0).parameters()),
        "steps_per_measurement": PERIOD,
        "repetitions": arguments.repetitions,
        "unwatched_ms_per_step": 1e3 * sorted(seconds["unwatched"])[len(seconds["unwatched"]) // 2] / PERIOD,
        "ratio": {name: ratio(seconds, name, "unwatched") for name in chosen if name != "unwatched"},
    }
    for name, figures in result["ratio"].items():  # type: ignore[attr-defined]
        print(f"{name:12s} {figures['median']:.4f}  [{figures['quartile_low']:.4f}, {figures['quartile_high']:.4f}]")
    print(write("watch_cost" if job.name == "lm-medium" else f"watch_cost_{job.name}", result))


if __name__ == "__main__":
    main()
