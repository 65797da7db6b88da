"""The learning-rate range test on a workload, with the model, optimizer and loss that its run would have.

One test reads one seed; `workload_lr_ranges` runs several and gives their median in log with its range.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from trimtab.compare.jobs import Job, Progress, run_jobs
from trimtab.compare.training import seed_list
from trimtab.tune.lr.lr_range import LRRange, lr_range_test, ramp, shares_of
from trimtab.workloads import Settings, Workload
from trimtab.workloads import workload as find_workload
from trimtab.workloads.session import Batches, Session
from trimtab.workloads.workload import seeded

__all__ = ["LRRanges", "workload_lr_range", "workload_lr_ranges"]


@dataclass(frozen=True)
class LRRanges:
    """What the range tests of several seeds found together.

    Attributes:
        seeds: of the tests, in order.
        tests: one for each seed.

    Example:
        >>> def found(lr):
        ...     return LRRange((), (), (), "diverged", lr, 10 * lr)
        >>> ranges = LRRanges((0, 1, 2), (found(0.1), found(0.001), found(0.01)))
        >>> ranges.suggestion, ranges.bounds("suggestion"), ranges.shown
        (0.01, (0.001, 0.1), 2)
    """

    seeds: tuple[int, ...]
    tests: tuple[LRRange, ...]

    def _found(self, name: str) -> list[float]:
        return [value for test in self.tests if (value := getattr(test, name)) is not None]

    def _median(self, name: str) -> float | None:
        found = self._found(name)
        if 2 * len(found) <= len(self.tests):
            return None
        if len(found) % 2:  # itself, not what rounding makes of its logarithm
            return statistics.median(found)
        return math.exp(statistics.median(map(math.log, found)))

    @property
    def suggestion(self) -> float | None:
        """Median in log of the seeds' suggestions; None unless more than half of the seeds have one."""
        return self._median("suggestion")

    @property
    def largest_stable(self) -> float | None:
        """Median in log of the seeds' largest stable rates; None unless more than half of the seeds have one."""
        return self._median("largest_stable")

    def bounds(self, name: str) -> tuple[float, float] | None:
        """Return the lowest and the highest of the seeds' values, or None where no seed has one.

        Args:
            name: "suggestion" or "largest_stable".
        """
        found = self._found(name)
        return (min(found), max(found)) if found else None

    @property
    def shown(self) -> int:
        """Place of the test whose curve stands for all: the one whose suggestion is nearest to the median."""
        middle = self.suggestion
        if middle is None:
            return 0
        far = [abs(math.log((test.suggestion or math.inf) / middle)) for test in self.tests]
        return far.index(min(far))

    @property
    def reason(self) -> str:
        """Why there is no suggestion, or what limits it; empty otherwise."""
        said = [(seed, test.reason) for seed, test in zip(self.seeds, self.tests, strict=True) if test.reason]
        if len(self.tests) == 1 or not said:
            return said[0][1] if said else ""
        lost = sum(test.suggestion is None for test in self.tests)
        head = f"{lost} of {len(self.tests)} seeds give no suggestion; " if lost else ""
        return f"{head}seed {said[0][0]}: {said[0][1]}"

    def to_json(self) -> dict[str, Any]:
        """Return the result as plain data: what is found, the curve of the seed shown, and every test."""
        bounds = {f"{name}_range": list(self.bounds(name) or ()) for name in ("suggestion", "largest_stable")}
        return {
            **self.tests[self.shown].to_json(),
            "suggestion": self.suggestion,
            "largest_stable": self.largest_stable,
            "reason": self.reason,
            **bounds,
            "shown_seed": self.seeds[self.shown],
            "tests": [{"seed": seed, **test.to_json()} for seed, test in zip(self.seeds, self.tests, strict=True)],
        }


def workload_lr_range(
    workload: Workload | str,
    settings: Settings | None = None,
    *,
    lowest: float = 1e-7,
    highest: float = 10.0,
    steps: int = 100,
    mode: str = "exponential",
    progress: Callable[[int, int, float], None] | None = None,
    text: str | Path | None = None,
) -> LRRange:
    """Run the range test on a workload, with its own batches, optimizer, remedies and clipping, without its schedule.

    Args:
        workload: a workload or its name.
        settings: of the run; the workload's defaults if left out. Learning rate, steps and schedule play no part.
        lowest: first rate, above 0.
        highest: last rate, above `lowest`.
        steps: optimizer steps, at least 10.
        mode: "exponential" or "linear".
        progress: called after each step with the steps done, the steps in all and the loss.
        text: a file or folder of text, for language models.

    Returns:
        What the test found, in rates of the settings; a pure function of the arguments.

    Raises:
        UsageError: if a setting or an argument cannot be used.

    Example:
        >>> found = workload_lr_range("digits-mlp", steps=40)
        >>> found.stopped_because, 1e-4 < found.suggestion < found.largest_stable
        ('diverged', True)
    """
    if isinstance(workload, str):
        workload = find_workload(workload)
    workload.prepare(text)
    asked = settings or workload.defaults
    with seeded(asked.seed):
        run = Session(workload, asked, {})

        def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
            inputs, targets = batch
            return run.loss(model(inputs), targets)

        ramp(lowest, highest, steps, mode)
        # Rates are those that settings would have: a group of parameters may have more of it (muP, with SGD).
        share = max(run.shares)
        found = lr_range_test(
            run.model,
            run.optimizer,
            loss,
            _Batches(run.batches),
            lowest=lowest * share,
            highest=highest * share,
            steps=steps,
            mode=mode,
            clip=run.settings.clip,
            progress=progress,
        )
        best, largest = (rate and rate / share for rate in (found.suggestion, found.largest_stable))
        return replace(found, lrs=tuple(rate / share for rate in found.lrs), suggestion=best, largest_stable=largest)


def workload_lr_ranges(
    workload: Workload | str,
    settings: Settings | None = None,
    *,
    folder: str | Path,
    seeds: int | Sequence[int] = 1,
    lowest: float = 1e-7,
    highest: float = 10.0,
    steps: int = 100,
    mode: str = "exponential",
    workers: int = 2,
    progress: Callable[[Progress], None] | None = None,
    text: str | Path | None = None,
) -> LRRanges:
    """Run the range test of a workload on several seeds, each a job of its own in a folder.

    A kill at any point loses no finished test, and the same call runs none of them again.

    Args:
        workload: a workload or its name.
        settings: of the run, as for `workload_lr_range`.
        folder: where the results of finished tests are kept.
        seeds: how many, counted from the seed of the settings, or which.
        lowest: first rate, above 0.
        highest: last rate, above `lowest`.
        steps: optimizer steps of each test, at least 10.
        mode: "exponential" or "linear".
        workers: processes.
        progress: called as steps and tests finish.
        text: a file or folder of text, for language models.

    Returns:
        What the tests found.

    Raises:
        UsageError: if a setting or an argument cannot be used.
        RunFailedError: if a test failed, after all others finished.
        RecordError: if the folder cannot be written.
    """
    if isinstance(workload, str):
        workload = find_workload(workload)
    data = workload.prepare(text)
    asked = settings or workload.defaults
    numbers = seed_list(seeds)
    if isinstance(seeds, int):
        numbers = tuple(asked.seed + number for number in numbers)
    # What no test could take is refused before anything is written.
    ramp(lowest, highest, steps, mode)
    workload.batch(asked.seed, 0, asked.batch_size)
    with seeded(asked.seed):
        shares_of(Session(workload, asked, {}).optimizer)
    jobs = [
        Job(
            "trimtab.tune.lr.workload_range:range_job",
            {
                "workload": workload.name,
                "settings": asked.replace(seed=seed).model_dump(mode="json"),
                "text": None if text is None else str(Path(text).resolve()),
                "data": data.sha256,
                "options": {"lowest": lowest, "highest": highest, "steps": steps, "mode": mode},
            },
            f"lr-range-{workload.name}-{asked.optimizer}-seed{seed}",
            steps,
        )
        for seed in numbers
    ]
    results = run_jobs(jobs, folder, workers=workers, progress=progress)
    return LRRanges(numbers, tuple(_from_json(result) for result in results))


def range_job(arguments: Mapping[str, Any], folder: Path, report: Callable[[int, float], None]) -> dict[str, Any]:
    """Run one test in a worker process; the task of `workload_lr_ranges`."""
    found = workload_lr_range(
        arguments["workload"],
        Settings(**arguments["settings"]),
        **arguments["options"],
        text=arguments["text"],
        progress=lambda done, steps, loss: report(done, loss),
    )
    return found.to_json()


def _from_json(data: Mapping[str, Any]) -> LRRange:
    values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in data.items()}
    return LRRange(**values)


class _Batches:
    """The batches of a run, from its first step on and without end."""

    def __init__(self, batches: Batches) -> None:
        self._take = batches

    def __iter__(self) -> Iterator[Any]:
        step = 0
        while True:
            yield self._take(step)
            step += 1
