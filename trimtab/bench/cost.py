"""What a step costs, measured apart: two arms take turns in one process, so that other work falls on both alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from trimtab.bench.runs import loaded
from trimtab.bench.suite import Task
from trimtab.compare import Job
from trimtab.workloads import Settings
from trimtab.workloads.session import Session

_ROUNDS = 8
_STEPS = 10


def cost_job(task: Task, reference: Settings, treated: Settings) -> Job:
    """Return the job that measures the CPU time of a step of `treated` against that of `reference`."""
    arguments = {
        "workload": task.workload,
        "reference": reference.model_dump(mode="json"),
        "treated": treated.model_dump(mode="json"),
    }
    return Job("trimtab.bench.cost:measure", arguments, f"cost-{task.name}-{treated.optimizer}")


def measure(arguments: Mapping[str, Any], folder: Path, report: Callable[[int, float], None]) -> dict[str, Any]:
    """Return both arms' CPU seconds a step (the median over rounds) and the mean of their ratio in each round.

    The rounds are spread over the run, because a step's cost may change along it: a curriculum is cheap at first.
    """
    job = loaded(arguments["workload"])
    arms = ("reference", "treated")
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    settings = {name: Settings(**arguments[name]) for name in arms}
    with torch.random.fork_rng():
        sessions = {name: Session(job, settings[name], {}) for name in arms}
        for turn in range(_ROUNDS + 1):
            for name in arms if turn % 2 else reversed(arms):
                session = sessions[name]
                session.at.step = max(0, 2 * turn - 1) * settings[name].steps // (2 * _ROUNDS)  # amid each part
                began = time.process_time()
                for _ in range(_STEPS):
                    session.step(None, None)
                if turn:  # the first round warms up
                    seconds[name].append((time.process_time() - began) / _STEPS)
    ratios = [treated / base for base, treated in zip(seconds["reference"], seconds["treated"], strict=True)]
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {**medians, "ratio": statistics.fmean(ratios)}
