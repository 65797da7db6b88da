"""One run of the benchmark as a job: what it ended with, its course, and what it cost."""

from __future__ import annotations

import functools
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trimtab.bench.suite import Task
from trimtab.compare import Job
from trimtab.compare.training import final_loss, prepared
from trimtab.record import Run
from trimtab.workloads import Outcome, Settings, Workload, train


@dataclass(frozen=True)
class Ended:
    """What came out of a run.

    Attributes:
        seed: the run's.
        value: the metric at the end of the schedule. A run that diverged, or whose loss ended above where it began,
            counts with its loss at initialisation, and a diverged one with an accuracy of 0.
        loss: the held-out loss at the end, counted likewise: it decides between points of equal value.
        initial: the metric at initialisation; 0 for an accuracy.
        diverged: whether a loss was not finite.
        steps: at which the metric was evaluated, ascending from 0.
        course: the metric there; its value at initialisation from where a run diverged on.
        cpu_seconds_per_step: of the training step, with its watch where there is one.
        mechanism: the explaining signals' worst values, where the run was watched.
    """

    seed: int
    value: float
    loss: float
    initial: float
    diverged: bool
    steps: tuple[int, ...]
    course: tuple[float, ...]
    cpu_seconds_per_step: float
    mechanism: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        """Return it as plain data."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Ended:
        """Return what `to_json` described."""
        return cls(**{**data, "steps": tuple(data["steps"]), "course": tuple(data["course"])})


def run_job(task: Task, settings: Settings, *, watch: bool, quick: bool = False) -> Job:
    """Return the job that trains a task.

    Args:
        task: of the suite.
        settings: complete, with the seed.
        watch: whether the explaining signals are recorded.
        quick: whether it is a shortened run, evaluated twice.
    """
    arguments = {
        "workload": task.workload,
        "metric": task.metric,
        "evaluations": task.evaluated(quick=quick),
        "settings": settings.model_dump(mode="json"),
        "watch": watch,
        "data": loaded(task.workload).data.sha256,
    }
    name = f"{task.name}-{settings.optimizer}-lr{settings.lr:g}-seed{settings.seed}"
    return Job("trimtab.bench.runs:run", arguments, name, settings.steps)


def run(arguments: Mapping[str, Any], folder: Path, report: Callable[[int, float], None]) -> dict[str, Any]:
    """Train in a worker process; the task of `run_job`. The record is read and not kept."""
    job = loaded(arguments["workload"])
    job.evaluations = arguments["evaluations"]  # type: ignore[misc]
    outcome = train(
        job,
        Settings(**arguments["settings"]),
        out=folder,
        watch=arguments["watch"],
        progress=lambda step, steps, loss: report(step, loss),
    )
    ended = read(outcome, arguments["metric"], arguments["evaluations"])
    shutil.rmtree(folder, ignore_errors=True)
    return ended.to_json()


def read(outcome: Outcome, metric: str, evaluations: int) -> Ended:
    """Return what counts of an outcome that has its record.

    Args:
        outcome: of a run with a folder.
        metric: `"loss"` or `"accuracy"`.
        evaluations: along the run, as it was trained with.
    """
    settings = outcome.settings
    initial = outcome.initial_loss if metric == "loss" else 0.0
    total = int(settings["steps"])
    every = max(1, total // evaluations)
    grid = [0, *range(every, total, every), total]
    with Run(str(outcome.folder)) as record:
        series = record.series(f"eval_{metric}")
        values = series.flat if len(series) else ()
        seen = {int(step) + 1: float(value) for step, value in zip(series.steps, values, strict=True)}
    seen[0] = initial
    if outcome.diverged:
        value = initial
        seen[total] = initial
    elif metric == "loss":
        value = final_loss(outcome)
    else:
        value = outcome.metrics[metric]
    course = [seen.get(step, initial) for step in grid]
    return Ended(
        seed=int(settings["seed"]),
        value=value,
        loss=final_loss(outcome),
        initial=initial,
        diverged=outcome.diverged,
        steps=tuple(grid),
        course=tuple(found if math.isfinite(found) else initial for found in course),
        cpu_seconds_per_step=outcome.cpu_seconds_per_step,
        mechanism=dict(outcome.mechanism),
    )


@functools.cache
def loaded(name: str) -> Workload:
    """Return a workload with its data, loaded once in a process: it depends on nothing else."""
    return prepared(name)
