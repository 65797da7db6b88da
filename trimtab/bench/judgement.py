"""What the measurements say: a verdict for each task, a speed-up over the suite, and the performance profile."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trimtab.bench import profile
from trimtab.bench.baselines import REFERENCE
from trimtab.bench.protocol import Measured, Result
from trimtab.bench.speed import CREDIBLE, median_curve, resampled, speed_up, time_to
from trimtab.bench.statistics import LEVEL, RESAMPLES, bootstrap, geometric_mean, holm, p_value
from trimtab.bench.suite import Task
from trimtab.compare import Paired, paired
from trimtab.compare.store import strict

_SEED = 20240102


@dataclass(frozen=True)
class TaskVerdict:
    """A contender against a baseline on one task.

    Attributes:
        task: its name.
        metric: what was compared.
        baseline_mean: the baseline's mean over the paired seeds.
        mean: the contender's.
        pair: the paired difference, its 95 % interval and the verdict without correction.
        p: of the paired t test, corrected by Holm over the tasks of this contender and baseline.
        verdict: the verdict that counts: `pair`'s if p is at most 0.05, else `"no evidence"`; empty where the protocol
            was not kept.
        speed_steps: how many times fewer steps it needs; None where neither learned the task.
        speed_cpu: how many times less CPU time.
    """

    task: str
    metric: str
    baseline_mean: float
    mean: float
    pair: Paired
    p: float
    verdict: str
    speed_steps: float | None
    speed_cpu: float | None

    def to_json(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {**vars(self), "pair": self.pair.to_json()}


@dataclass(frozen=True)
class Speed:
    """A geometric mean of speed-ups over tasks, and its bootstrap interval over tasks and seeds."""

    mean: float
    low: float
    high: float
    tasks: int

    @property
    def credible(self) -> bool:
        """Whether it is within what fair comparisons find."""
        return not self.mean > CREDIBLE[1]

    def __str__(self) -> str:
        if not self.tasks:
            return "no task to measure it on"
        flag = "" if self.credible else f"; above {CREDIBLE[1]:g}: look for a mistake first"
        return f"{self.mean:.2f}x ({LEVEL:.0%} interval {self.low:.2f} to {self.high:.2f}, {self.tasks} tasks{flag})"

    def to_json(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {**vars(self), "credible": self.credible, "credible_range": list(CREDIBLE)}


@dataclass(frozen=True)
class Judgement:
    """A contender against one baseline over the suite."""

    baseline: str
    tasks: tuple[TaskVerdict, ...]
    steps: Speed
    cpu: Speed

    def count(self, verdict: str) -> int:
        """Return on how many tasks the verdict is this one."""
        return sum(found.verdict == verdict for found in self.tasks)

    def to_json(self) -> dict[str, Any]:
        """Return it as strict JSON data."""
        return strict(
            {
                "baseline": self.baseline,
                "tasks": [found.to_json() for found in self.tasks],
                "speed_steps": self.steps.to_json(),
                "speed_cpu": self.cpu.to_json(),
            }
        )


def judge(candidate: Measured, baseline: Measured, tasks: Sequence[Task], *, resamples: int = RESAMPLES) -> Judgement:
    """Compare a contender with a baseline on every task that both have.

    Args:
        candidate: measured on the first seeds of the baseline's.
        baseline: with at least as many seeds.
        tasks: of the suite.
        resamples: of the bootstrap.
    """
    shared = [task for task in tasks if task.name in candidate.results and task.name in baseline.results]
    sides = [(task, baseline.results[task.name], candidate.results[task.name]) for task in shared]
    pairs = [
        paired(base.values[: len(own.values)], own.values, higher_is_better=task.higher_is_better)
        for task, base, own in sides
    ]
    corrected = holm([p_value(pair) for pair in pairs])
    found = []
    draws: list[list[float]] = []
    costs: list[float] = []
    for (task, base, own), pair, p in zip(sides, pairs, corrected, strict=True):
        n = len(own.values)
        cost = own.cost / base.cost
        steps = None
        if _learned(task, base) or _learned(task, own):
            steps = speed_up(task, base.runs, own.runs)
            generator = np.random.default_rng(_SEED)
            draws.append(resampled(task, base.runs, own.runs, generator, resamples))
            costs.append(cost)
        word = pair.verdict if p <= 1 - LEVEL else "no evidence"
        found.append(
            TaskVerdict(
                task=task.name,
                metric=task.metric,
                baseline_mean=math.fsum(base.values[:n]) / n,
                mean=math.fsum(own.values) / n,
                pair=pair,
                p=p,
                verdict="" if "quick" in (candidate.budget, baseline.budget) else word,
                speed_steps=steps,
                speed_cpu=None if steps is None else steps / cost,
            )
        )
    return Judgement(
        baseline.contender.arm,
        tuple(found),
        _speed([entry.speed_steps for entry in found], draws),
        _speed(
            [entry.speed_cpu for entry in found],
            [[value / cost for value in own] for own, cost in zip(draws, costs, strict=True)],
        ),
    )


def _speed(values: Sequence[float | None], draws: Sequence[Sequence[float]]) -> Speed:
    known = [value for value in values if value is not None]
    low, high = bootstrap(draws, np.random.default_rng(_SEED))
    return Speed(geometric_mean(known), low, high, len(known))


def _learned(task: Task, result: Result) -> bool:
    value = float(np.median(result.values))
    return task.has_learned(value, float(np.median([run.initial for run in result.runs])))


def times(measured: Mapping[str, Measured], tasks: Sequence[Task], *, cpu: bool) -> dict[str, dict[str, float]]:
    """Return each contender's time to each task's target, for a performance profile.

    The target is the reference's median final value over its seeds, or what is enough to solve the task; a contender
    arrives when its median curve does.

    Args:
        measured: by label, the reference among them.
        tasks: of the suite; those that the reference did not learn have no target and are left out.
        cpu: whether the unit is the CPU time of the reference's step, otherwise steps.

    Returns:
        By label and task; infinite where the target is never reached or the contender does not run.
    """
    reference = measured[REFERENCE]
    asked = [task for task in tasks if task.name in reference.results and _learned(task, reference.results[task.name])]
    found: dict[str, dict[str, float]] = {}
    for label, entry in measured.items():
        found[label] = {}
        for task in asked:
            target = task.target(float(median_curve(reference.results[task.name].runs)[1][-1]))
            own = entry.results.get(task.name)
            time = math.inf
            if own is not None:
                steps, curve = median_curve(own.runs)
                time = time_to(steps, curve, target, higher_is_better=task.higher_is_better)
                time = max(time, float(steps[1])) * (own.cost if cpu else 1.0)
            found[label][task.name] = time
    return found


def profiles(measured: Mapping[str, Measured], tasks: Sequence[Task], *, cpu: bool = False) -> dict[str, Any]:
    """Return the performance profile of contenders: their times, ratios, curves and scores, as strict JSON data."""
    found = times(measured, tasks, cpu=cpu)
    relative = profile.ratios(found)
    return strict(
        {
            "unit": "cpu" if cpu else "steps",
            "tau_max": profile.TAU_MAX,
            "contenders": [
                {
                    "label": label,
                    "times": found[label],
                    "ratios": own,
                    "curve": profile.steps_of(list(own.values())),
                    "score": profile.score(own),
                }
                for label, own in relative.items()
            ],
        }
    )
