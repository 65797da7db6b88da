"""The benchmark: baselines first, then a contender on equal terms, and what comes of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimtab.bench.baselines import BASELINES, kept, tuned
from trimtab.bench.judgement import Judgement, judge, profiles
from trimtab.bench.protocol import FULL, QUICK, Budget, Measured, measure, possible_tasks, runner
from trimtab.bench.spaces import Contender
from trimtab.bench.suite import Task, tasks
from trimtab.compare import Progress
from trimtab.compare.store import strict, write_results
from trimtab.errors import UsageError

RESULTS = "bench.json"


@dataclass(frozen=True)
class Benchmark:
    """A contender, the baselines, and the judgement between them.

    Attributes:
        budget: what everyone got; not the protocol if it is the quick one.
        tasks: of the suite.
        baselines: by name.
        candidate: the contender; None where only the baselines were tuned.
        judgements: against each baseline, by its name.
    """

    budget: Budget
    tasks: tuple[Task, ...]
    baselines: dict[str, Measured]
    candidate: Measured | None
    judgements: dict[str, Judgement]

    @property
    def measured(self) -> dict[str, Measured]:
        """Everyone, by label."""
        own = {} if self.candidate is None else {self.candidate.contender.arm: self.candidate}
        return {**self.baselines, **own}

    def profiles(self) -> dict[str, Any]:
        """Return the performance profiles in steps and in CPU time."""
        return {unit: profiles(self.measured, self.tasks, cpu=unit == "cpu") for unit in ("steps", "cpu")}

    def to_json(self) -> dict[str, Any]:
        """Return it as strict JSON data."""
        found = {
            "protocol": self.budget.name,
            "budget": vars(self.budget).copy(),
            "tasks": [{**vars(task), "changes": dict(task.changes)} for task in self.tasks],
            "candidate": None if self.candidate is None else self.candidate.to_json(),
            "baselines": {name: found.to_json() for name, found in self.baselines.items()},
            "judgements": [found.to_json() for found in self.judgements.values()],
            "profiles": self.profiles(),
        }
        return strict(found)


def bench(
    contender: Contender | str | None,
    *,
    folder: str | Path,
    tune_baselines: bool = False,
    quick: bool = False,
    only: Sequence[str] | None = None,
    workers: int = 2,
    progress: Callable[[Progress], None] | None = None,
) -> Benchmark:
    """Measure an arm on the suite against tuned baselines; runs that are already in `folder` are not repeated.

    Everyone gets 40 quasi-random points on each task at one seed, and is run again at the best of them: 20 times
    (AdamW and SGD), or 10 times on the first of the same seeds. The result is also written to `FOLDER/bench.json`.

    Args:
        contender: the arm (`"lion,with=qk-norm"`); None tunes the baselines only.
        folder: where runs and results go.
        tune_baselines: whether baselines that are missing are tuned first; otherwise they are asked for.
        quick: three points, two seeds and a tenth of the steps, to try the machinery out; it gives no verdicts.
        only: tasks, instead of the whole suite.
        workers: processes.
        progress: called as steps and runs finish.

    Returns:
        The measurements and what they say.

    Raises:
        UsageError: if the arm cannot be used, or the baselines are not tuned.
        RunFailedError: if runs failed.
        RecordError: if the folder cannot be written.
    """
    budget = QUICK if quick else FULL
    suite = tasks(only)
    if isinstance(contender, str):
        contender = Contender.parse(contender)
    if contender is not None and contender.arm in BASELINES:
        raise UsageError(f"{contender.arm} is a baseline itself: give another arm, or none to tune the baselines.")
    if contender is None and not tune_baselines:
        raise UsageError("give an arm to measure, or --tune-baselines.")
    run = runner(folder, workers=workers, progress=progress)
    if contender is not None:
        possible_tasks(contender, suite, budget)  # a wrong arm is refused before the baselines are tuned
    baselines = tuned(suite, budget, run) if tune_baselines else kept(folder, suite, budget)
    candidate = None
    if contender is not None:
        reference = next(iter(baselines.values()))
        candidate = measure(contender, suite, budget, run, seeds=budget.seeds, reference=reference)
    judgements = {} if candidate is None else {name: judge(candidate, base, suite) for name, base in baselines.items()}
    found = Benchmark(budget, suite, baselines, candidate, judgements)
    write_results(Path(folder) / RESULTS, "bench", found.to_json())
    return found
