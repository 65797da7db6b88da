"""The baselines: torch's AdamW and SGD, tuned like everyone else, run on twice the seeds, kept as long as they hold."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from trimtab.bench.protocol import Budget, Measured, Runner, measure
from trimtab.bench.spaces import Contender
from trimtab.bench.suite import Task
from trimtab.compare import Job
from trimtab.compare.store import read_json
from trimtab.errors import UsageError

REFERENCE = "adamw"
"""Against whom speed is measured, and whose final values are the targets."""

BASELINES = (REFERENCE, "sgd")


class _Missing(Exception):
    """A result that is not there."""


def tuned(tasks: Sequence[Task], budget: Budget, run: Runner) -> dict[str, Measured]:
    """Return the baselines, by name, with whatever `run` does to get results."""
    found: dict[str, Measured] = {}
    for name in BASELINES:
        contender = Contender.parse(name)
        reference = found.get(REFERENCE)
        found[name] = measure(contender, tasks, budget, run, seeds=budget.baseline_seeds, reference=reference)
    return found


def kept(folder: str | Path, tasks: Sequence[Task], budget: Budget) -> dict[str, Measured]:
    """Return the baselines that were tuned earlier in a folder, by the same code, torch, Python and CPU.

    Raises:
        UsageError: if they are not there, or not whole.
    """
    try:
        return tuned(tasks, budget, _reader(Path(folder)))
    except _Missing:
        profile = " --quick" if budget.quick else ""
        raise UsageError(
            f"the baselines ({' and '.join(BASELINES)}) are not tuned in {folder} for this code, torch and CPU: "
            f"run trimtab bench --tune-baselines{profile} --out {folder} first."
        ) from None


def _reader(folder: Path) -> Callable[[Sequence[Job]], list[dict[str, Any]]]:
    """Return what reads results and runs nothing."""

    def read(jobs: Sequence[Job]) -> list[dict[str, Any]]:
        results = []
        for job in jobs:
            result = (read_json(folder / "jobs" / f"{job.key}.json") or {}).get("result")
            if not isinstance(result, dict):
                raise _Missing
            results.append(result)
        return results

    return read
