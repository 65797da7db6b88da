"""The protocol: an equal number of quasi-random points for everyone, the best of them run again on other seeds."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimtab.bench.cost import cost_job
from trimtab.bench.runs import Ended, loaded, run_job
from trimtab.bench.spaces import Contender
from trimtab.bench.suite import Task
from trimtab.compare import Job, Progress, run_jobs
from trimtab.errors import UsageError
from trimtab.workloads import Settings
from trimtab.workloads.session import Session
from trimtab.workloads.workload import seeded

TUNING_SEED = 1000
"""The seed of every tuning run, none of those that count."""

Runner = Callable[[Sequence[Job]], list[dict[str, Any]]]
"""What turns jobs into their results."""


@dataclass(frozen=True)
class Budget:
    """How much everyone gets.

    Attributes:
        name: `"full"`, the protocol, or `"quick"`, which only tries the machinery out.
        points: tuning runs on each task.
        seeds: runs at the best point that count.
        baseline_seeds: the same for baselines, which set the targets.
    """

    name: str
    points: int
    seeds: int
    baseline_seeds: int

    @property
    def quick(self) -> bool:
        """Whether this is not the protocol."""
        return self.name != "full"


FULL = Budget("full", points=40, seeds=10, baseline_seeds=20)
QUICK = Budget("quick", points=3, seeds=2, baseline_seeds=2)


@dataclass(frozen=True)
class Point:
    """One tuning run: where it was, what it ended with."""

    at: dict[str, float]
    value: float
    loss: float
    diverged: bool


@dataclass(frozen=True)
class Result:
    """What a contender did on one task.

    Attributes:
        task: its name.
        points: the tuning runs, in order.
        best: which of them was best.
        lr_at_edge: whether its learning rate is at the edge of its range.
        settings: those of the best point, without a seed.
        runs: at the best point, one for each seed from 0.
        cost: CPU time of a step relative to the reference's, measured apart; 1 for the reference.
    """

    task: str
    points: tuple[Point, ...]
    best: int
    lr_at_edge: bool
    settings: dict[str, Any]
    runs: tuple[Ended, ...]
    cost: float = 1.0

    @property
    def values(self) -> list[float]:
        """The metric at the end, seed by seed."""
        return [run.value for run in self.runs]

    @property
    def diverged_points(self) -> int:
        """How many tuning runs diverged."""
        return sum(point.diverged for point in self.points)

    @property
    def diverged_runs(self) -> int:
        """How many of the runs that count diverged."""
        return sum(run.diverged for run in self.runs)

    @property
    def mechanism(self) -> dict[str, float]:
        """The mean over seeds of each explaining signal's worst value; those that every run has."""
        names = set.intersection(*(set(run.mechanism) for run in self.runs))
        return {name: statistics.fmean(run.mechanism[name] for run in self.runs) for name in sorted(names)}

    def to_json(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {
            "task": self.task,
            "best": self.points[self.best].at,
            "best_point": self.best,
            "lr_at_edge": self.lr_at_edge,
            "diverged_points": self.diverged_points,
            "diverged_runs": self.diverged_runs,
            "cost": self.cost,
            "settings": self.settings,
            "mechanism": self.mechanism,
            "values": self.values,
            "points": [vars(point).copy() for point in self.points],
            "runs": [run.to_json() for run in self.runs],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Result:
        """Return what `to_json` described."""
        return cls(
            task=data["task"],
            points=tuple(Point(**point) for point in data["points"]),
            best=data["best_point"],
            lr_at_edge=data["lr_at_edge"],
            settings=dict(data["settings"]),
            runs=tuple(Ended.from_json(run) for run in data["runs"]),
            cost=data["cost"],
        )


@dataclass(frozen=True)
class Measured:
    """What a contender did on the suite.

    Attributes:
        contender: the arm and its range.
        budget: name of the budget.
        results: by task.
        left_out: tasks on which the arm cannot run, and why.
    """

    contender: Contender
    budget: str
    results: dict[str, Result]
    left_out: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {
            "arm": self.contender.arm,
            "lr": list(self.contender.lr),
            "budget": self.budget,
            "left_out": self.left_out,
            "results": [result.to_json() for result in self.results.values()],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Measured:
        """Return what `to_json` described."""
        low, high = data["lr"]
        results = [Result.from_json(entry) for entry in data["results"]]
        return cls(
            Contender(data["arm"], (low, high)),
            data["budget"],
            {found.task: found for found in results},
            dict(data["left_out"]),
        )


def runner(folder: str | Path, *, workers: int, progress: Callable[[Progress], None] | None) -> Runner:
    """Return what runs jobs in worker processes and keeps their results in a folder."""
    return lambda jobs: run_jobs(jobs, folder, workers=workers, progress=progress)


def measure(
    contender: Contender,
    tasks: Sequence[Task],
    budget: Budget,
    run: Runner,
    *,
    seeds: int,
    reference: Measured | None = None,
) -> Measured:
    """Tune a contender on every task, run it again at its best points, and measure what its step costs.

    Args:
        contender: the arm.
        tasks: of the suite.
        budget: the points of each task, and whether runs are shortened.
        run: what runs jobs.
        seeds: how many runs count.
        reference: whose step the cost is measured against, at its own best points; None for the reference itself.

    Raises:
        UsageError: if the arm can run on none of the tasks.
        RunFailedError: if runs failed.
    """
    possible, left_out = possible_tasks(contender, tasks, budget)
    points = {task.name: contender.points(task, budget.points) for task in possible}
    tuning = [
        run_job(
            task,
            _at(contender, task, point, budget).replace(seed=TUNING_SEED),
            watch=False,
            quick=budget.quick,
        )
        for task in possible
        for point in points[task.name]
    ]
    tried = iter([Ended.from_json(result) for result in run(tuning)])
    found: dict[str, tuple[Point, ...]] = {}
    chosen: dict[str, tuple[int, Settings]] = {}
    for task in possible:
        ended = [
            Point(dict(point), end.value, end.loss, end.diverged)
            for point, end in zip(points[task.name], tried, strict=False)
        ]
        found[task.name] = tuple(ended)
        best = min(range(len(ended)), key=lambda place: score(task, ended[place]))
        chosen[task.name] = best, _at(contender, task, ended[best].at, budget)
    again = [
        run_job(task, chosen[task.name][1].replace(seed=seed), watch=True, quick=budget.quick)
        for task in possible
        for seed in range(seeds)
    ]
    costs: list[Job] = []
    if reference is not None:
        base = {task.name: Settings(**reference.results[task.name].settings) for task in possible}
        costs = [cost_job(task, base[task.name], chosen[task.name][1]) for task in possible]
    outcomes = run([*again, *costs])
    results = {}
    for place, task in enumerate(possible):
        best, settings = chosen[task.name]
        results[task.name] = Result(
            task=task.name,
            points=found[task.name],
            best=best,
            lr_at_edge=contender.lr_at_edge(found[task.name][best].at),
            settings=settings.model_dump(mode="json", exclude={"seed"}),
            runs=tuple(Ended.from_json(entry) for entry in outcomes[place * seeds : (place + 1) * seeds]),
            cost=float(outcomes[len(again) + place]["ratio"]) if costs else 1.0,
        )
    return Measured(contender, budget.name, results, left_out)


def score(task: Task, point: Point) -> tuple[float, float]:
    """Return what tuning minimises: the metric, and the held-out loss among equals."""
    return (-point.value if task.higher_is_better else point.value), point.loss


def _at(contender: Contender, task: Task, point: Mapping[str, float], budget: Budget) -> Settings:
    return contender.at(task, point, quick=budget.quick)


def possible_tasks(contender: Contender, tasks: Sequence[Task], budget: Budget) -> tuple[list[Task], dict[str, str]]:
    """Return the tasks that the arm can run on, and why it cannot run on the others.

    Raises:
        UsageError: if it can run on none, or its tuning would go where its settings do not fit together.
    """
    possible: list[Task] = []
    left_out: dict[str, str] = {}
    for task in tasks:
        settings = contender.settings(task, quick=budget.quick)  # a wrong arm is refused, whatever the task
        for point in contender.points(task, budget.points):
            _at(contender, task, point, budget)
        try:
            with seeded(settings.seed):
                Session(loaded(task.workload), settings, {})
        except UsageError as error:
            left_out[task.name] = str(error)
        else:
            possible.append(task)
    if not possible:
        raise UsageError(f"the arm {contender.arm!r} runs on no task: {next(iter(left_out.values()))}")
    return possible, left_out
