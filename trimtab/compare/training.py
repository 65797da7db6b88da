"""Training runs as jobs: one outcome for each pair of settings and seed, recorded under `FOLDER/runs/KEY`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from trimtab.compare.jobs import Job, Progress, run_folder, run_jobs
from trimtab.errors import UsageError
from trimtab.workloads import Outcome, Settings, Workload, train, workload

_MOST_SEEDS = 1000


def prepared(name: str, text: str | Path | None = None) -> Workload:
    """Return a workload with its data loaded.

    Raises:
        UsageError: if there is no such workload, or the text cannot be used.
    """
    found = workload(name)
    found.prepare(text)
    return found


def training_job(workload: Workload, settings: Settings, text: str | Path | None = None) -> Job:
    """Return the job that trains a workload with these settings, recorded by the default watch."""
    optimizer = [] if settings.optimizer == workload.defaults.optimizer else [settings.optimizer]
    name = "-".join([workload.name, *optimizer, *settings.remedies, f"lr{settings.lr:g}", f"seed{settings.seed}"])
    arguments = {
        "workload": workload.name,
        "settings": settings.model_dump(mode="json"),
        "text": None if text is None else str(Path(text).resolve()),
        "data": workload.data.sha256,
    }
    return Job("trimtab.compare.training:train_job", arguments, name, settings.steps)


def train_job(arguments: Mapping[str, Any], folder: Path, report: Callable[[int, float], None]) -> dict[str, Any]:
    """Train in a worker process; the task of `training_job`."""
    outcome = train(
        arguments["workload"],
        Settings(**arguments["settings"]),
        out=folder,
        text=arguments["text"],
        progress=lambda step, steps, loss: report(step, loss),
    )
    return outcome.to_json()


def run_all(
    jobs: Sequence[Job],
    folder: str | Path,
    *,
    workers: int = 2,
    progress: Callable[[Progress], None] | None = None,
) -> list[Outcome]:
    """Run training jobs (see `trimtab.compare.run_jobs`) and return their outcomes with their folders."""
    outcomes = [Outcome.from_json(result) for result in run_jobs(jobs, folder, workers=workers, progress=progress)]
    return [
        dataclasses.replace(outcome, folder=str(run_folder(folder, job)))
        for job, outcome in zip(jobs, outcomes, strict=True)
    ]


def final_loss(outcome: Outcome) -> float:
    """Return the loss that counts: a run that diverged, or ended above where it began, counts as its initial loss."""
    loss, initial = outcome.loss, outcome.initial_loss
    return loss if not outcome.diverged and loss <= initial else initial


def outcome_json(outcome: Outcome) -> dict[str, Any]:
    """Return an outcome as JSON data for a result file: with its seed, and with the loss that counts."""
    return {**outcome.to_json(), "seed": outcome.settings["seed"], "loss": final_loss(outcome)}


def seed_list(seeds: int | Sequence[int]) -> tuple[int, ...]:
    """Return seeds 0 to N - 1 for a number N, or the seeds as given.

    Raises:
        UsageError: if there is none, one repeats, or there are more than a thousand.
    """
    if isinstance(seeds, int) and not 1 <= seeds <= _MOST_SEEDS:
        raise UsageError(f"a comparison takes 1 to {_MOST_SEEDS} seeds, got {seeds}.")
    found = tuple(range(seeds)) if isinstance(seeds, int) else tuple(seeds)
    if not 1 <= len(found) <= _MOST_SEEDS or len(set(found)) != len(found):
        raise UsageError(f"a comparison takes 1 to {_MOST_SEEDS} different seeds, got {len(found)}.")
    return found
