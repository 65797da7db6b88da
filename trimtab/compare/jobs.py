"""Run many jobs in worker processes, so that a kill at any point loses no finished job and repeats none.

A job is a function named by import path with JSON arguments. Its result appears as `FOLDER/jobs/KEY.json` only when it
is whole; KEY holds a hash of the function, its arguments, trimtab's code, torch, Python and the CPU, so a result is
found again exactly as long as a repetition would give the same.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import platform
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimtab.compare.pool import Pool
from trimtab.compare.store import claimed, read_json
from trimtab.errors import RunFailedError, UsageError
from trimtab.record.environment import processor

_BYSTANDERS = ("cli", "diagnose", "integrations", "report", "testing")
"""Rooms that cannot change what a job returns, so that work on them keeps finished jobs valid."""

_STOREYS = (("studies",), ("tune", "trial.py"), ("bench",))
"""Rooms above `compare`, in the order in which they build on each other: a task depends on those up to its own."""


@dataclass(frozen=True)
class Job:
    """One piece of work for a worker process.

    Args:
        task: import path `"package.module:function"`; it is called as `function(arguments, folder, report)`, may write
            into its `folder`, calls `report(step, loss)` as it goes, and returns a JSON object.
        arguments: JSON values.
        name: a readable start of the key; part of the job's identity, so it must follow from the arguments.
        steps: how many steps the progress counts for it.
    """

    task: str
    arguments: Mapping[str, Any]
    name: str
    steps: int = 1

    @property
    def key(self) -> str:
        """The job's file name: its name and a hash of everything that its result depends on."""
        identity = json.dumps([self.task, self.name, self.arguments, fingerprint(_above(self.task))], sort_keys=True)
        digest = hashlib.sha256(identity.encode()).hexdigest()[:12]
        return f"{re.sub(r'[^A-Za-z0-9._-]+', '-', self.name)[:80]}-{digest}"


@dataclass(frozen=True)
class Progress:
    """Where a set of jobs stands.

    Attributes:
        done: finished jobs.
        total: all jobs.
        steps_done: steps done over all jobs.
        steps_total: steps of all jobs.
        job: name of the job that moved last.
        step: its steps done.
        loss: its latest loss, or NaN.
        note: a line for people when something out of the ordinary happened, else empty.
    """

    done: int
    total: int
    steps_done: int
    steps_total: int
    job: str = ""
    step: int = 0
    loss: float = float("nan")
    note: str = ""


def run_jobs(
    jobs: Sequence[Job],
    folder: str | Path,
    *,
    workers: int = 2,
    progress: Callable[[Progress], None] | None = None,
) -> list[dict[str, Any]]:
    """Run jobs in `workers` spawned processes with one torch thread each, and return their results in order.

    Jobs finished earlier in the same folder are not run again. A worker that dies (out of memory, a crash) is replaced
    and its job tried once more; if it fails again, or raises, the other jobs still run. Workers die with this process,
    however it ends.

    Args:
        jobs: what to run; equal jobs run once.
        folder: where results (`jobs/KEY.json`) and what the jobs write (`runs/KEY/`) go.
        workers: processes.
        progress: called as steps and jobs finish.

    Returns:
        One result for each job.

    Raises:
        UsageError: if a job says that it was asked for something wrong (this stops the others), if `workers` is not
            positive, or if another process works in the folder.
        RunFailedError: if jobs failed, after all others finished.
        RecordError: if the folder cannot be written.
    """
    if workers < 1:
        raise UsageError(f"workers must be at least 1, got {workers}.")
    folder = Path(folder)
    unique = {job.key: job for job in jobs}
    with claimed(folder):
        results = {key: result for key in unique if (result := _finished(folder, key)) is not None}
        counter = _Counter(unique, set(results), progress)
        counter.tell()
        waiting = {key: job for key, job in unique.items() if key not in results}
        if waiting:
            orders = [{"key": key, "task": job.task, "arguments": dict(job.arguments)} for key, job in waiting.items()]
            with Pool(folder, min(workers, len(orders))) as pool:
                failures = pool.run(orders, counter)
            for key in waiting:
                if (result := _finished(folder, key)) is not None:
                    results[key] = result
            _raise_failures({unique[key].name: reason for key, reason in failures.items()}, len(unique), folder)
    return [results[job.key] for job in jobs]


def _finished(folder: Path, key: str) -> dict[str, Any] | None:
    """Return a job's result, or None if it has none yet."""
    document = read_json(folder / "jobs" / f"{key}.json")
    result = (document or {}).get("result")
    return result if isinstance(result, dict) else None


def run_folder(folder: str | Path, job: Job) -> Path:
    """Return the folder in which a job's run is recorded."""
    return Path(folder) / "runs" / job.key


def _raise_failures(failures: Mapping[str, str], total: int, folder: Path) -> None:
    if not failures:
        return
    name, reason = next(iter(failures.items()))
    others = "the finished ones are kept" if len(failures) < total else "none finished"
    raise RunFailedError(
        f"{len(failures)} of {total} jobs failed in {folder} ({others}; run again to retry): {name}: {reason}"
    )


class _Counter:
    """Turn the pool's messages into `Progress`."""

    def __init__(
        self, jobs: Mapping[str, Job], finished: set[str], progress: Callable[[Progress], None] | None
    ) -> None:
        self._jobs = jobs
        self._finished = finished
        self._running: dict[str, int] = {}
        self._progress = progress

    def moved(self, key: str, step: int, loss: float) -> None:
        self._running[key] = min(step, self._jobs[key].steps)
        self.tell(key, loss)

    def ended(self, key: str) -> None:
        self._running.pop(key, None)
        self._finished.add(key)
        self.tell(key)

    def note(self, key: str, text: str) -> None:
        self._running.pop(key, None)
        self.tell(key, note=f"{self._jobs[key].name}: {text}")

    def tell(self, key: str = "", loss: float = float("nan"), note: str = "") -> None:
        if self._progress is None:
            return
        steps = sum(self._jobs[done].steps for done in self._finished) + sum(self._running.values())
        job = self._jobs.get(key)
        at = (job.steps if key in self._finished else self._running.get(key, 0)) if job else 0
        total = sum(entry.steps for entry in self._jobs.values())
        self._progress(
            Progress(len(self._finished), len(self._jobs), steps, total, job.name if job else "", at, loss, note)
        )


def _above(task: str) -> tuple[str, ...]:
    """Return the rooms that a task cannot depend on, because they build on the one it is in."""
    room = task.partition(":")[0].split(".")[1] if task.startswith("trimtab.") else ""
    own = next((place for place, rooms in enumerate(_STOREYS) if room in rooms), None)
    if own is None:
        own = -1 if room == "compare" else len(_STOREYS)
    return tuple(name for rooms in _STOREYS[own + 1 :] for name in rooms)


@functools.cache
def fingerprint(above: tuple[str, ...] = ()) -> str:
    """Return a hash of what a result depends on besides its settings: code, torch, numpy, Python and the CPU.

    Args:
        above: rooms to leave out, besides those that no result depends on.
    """
    home = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    for path in sorted(home.rglob("*.py")):
        place = path.relative_to(home)
        if place.parts[0] not in (*_BYSTANDERS, *above):
            digest.update(f"{place.as_posix()}\0".encode() + path.read_bytes() + b"\0")
    for package in ("torch", "numpy"):
        digest.update(importlib.metadata.version(package).encode())
    digest.update(f"{platform.python_version()} {platform.machine()} {processor()}".encode())
    return digest.hexdigest()
