"""The coordinate check on a workload: each width, seed and parametrisation is a job that survives a kill."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.compare.jobs import Job, Progress, run_jobs
from trimtab.compare.store import strict, write_results
from trimtab.compare.training import prepared
from trimtab.errors import choose
from trimtab.layers.initialization.mup import apply_mup
from trimtab.tune.scaling.coordinates import (
    PARAMETRIZATIONS,
    CoordinateCheck,
    check_plan,
    measure_coordinates,
    plain_optimizer,
    read_coordinates,
)
from trimtab.workloads import workload as find_workload

__all__ = ["workload_coordinate_check"]

RESULTS = "coord-check.json"


def workload_coordinate_check(
    workload: str,
    *,
    widths: Sequence[int],
    folder: str | Path,
    parametrizations: Sequence[str] = ("mup",),
    lr: float | None = None,
    optimizer: str = "adam",
    steps: int = 5,
    seeds: int = 3,
    batch_size: int = 16,
    tolerance: float = 0.3,
    workers: int = 2,
    text: str | Path | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> dict[str, CoordinateCheck]:
    """Run the coordinate check on a workload at its own learning rate; muP's base is the workload's own width.

    Models finished earlier in the same folder are not trained again. The result is also written to
    `FOLDER/coord-check.json`.

    Args:
        workload: a workload's name.
        widths: three or more.
        folder: where jobs and the result go.
        parametrizations: `"mup"`, `"standard"` or both.
        lr: learning rate; default the workload's.
        optimizer: `"adam"` or `"sgd"`, without decay, momentum or clipping.
        steps: at least 1.
        seeds: models of each width.
        batch_size: samples of a step.
        tolerance: largest slope that counts as flat.
        workers: processes.
        text: a file or folder of text, for language models.
        progress: called as steps and jobs finish.

    Returns:
        A check for each parametrisation.

    Raises:
        UsageError: if an argument breaks its rule, or the workload has no such widths.
        RunFailedError: if a job failed.
        RecordError: if the folder cannot be written.
    """
    rising = check_plan(widths, steps, seeds, tolerance)
    for name in parametrizations:
        choose("parametrization", name, PARAMETRIZATIONS)
    found = prepared(workload, text)
    rate = found.defaults.lr if lr is None else lr
    found.batch(0, 0, batch_size)
    for width in rising:
        with torch.device("meta"):
            model = found.model(0, width=width)
        plain_optimizer(model, optimizer, rate, mup=False)
    shared = {
        "workload": workload,
        "text": None if text is None else str(Path(text).resolve()),
        "data": found.data.sha256,
        "lr": rate,
        "optimizer": optimizer,
        "steps": steps,
        "batch_size": batch_size,
    }
    # The widest first: they take longest, and the others fill the gaps.
    plan = [
        (name, seed, width)
        for width in reversed(rising)
        for name in dict.fromkeys(parametrizations)
        for seed in range(seeds)
    ]
    jobs = [
        Job(
            "trimtab.tune.scaling.workload_coordinates:coordinates_job",
            {**shared, "parametrization": name, "seed": seed, "width": width},
            f"{workload}-{name}-width{width}-seed{seed}",
            steps,
        )
        for name, seed, width in plan
    ]
    results = dict(zip(plan, run_jobs(jobs, folder, workers=workers, progress=progress), strict=True))
    checks = {
        name: read_coordinates(
            [[results[name, seed, width] for width in rising] for seed in range(seeds)],
            rising,
            parametrization=name,
            tolerance=tolerance,
        )
        for name in dict.fromkeys(parametrizations)
    }
    write_results(Path(folder) / RESULTS, "coord-check", coordinates_json(checks, shared))
    return checks


def coordinates_json(checks: Mapping[str, CoordinateCheck], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return checks of one workload as strict JSON data."""
    plain = {name: value for name, value in settings.items() if name != "data"}
    return strict({**plain, "checks": [check.to_json() for check in checks.values()]})


def coordinates_job(arguments: Mapping[str, Any], folder: Path, report: Callable[[int, float], None]) -> dict[str, Any]:
    """Train one model for the steps of a check; a job in a worker process."""
    job = find_workload(arguments["workload"])
    job.prepare(arguments["text"])
    seed, mup = arguments["seed"], arguments["parametrization"] == "mup"
    model = job.model(seed, width=arguments["width"])
    if mup:
        with torch.device("meta"):
            base = job.model(seed)
        apply_mup(model, base)
    batches = [job.batch(seed, step, arguments["batch_size"]) for step in range(arguments["steps"])]

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        inputs, targets = batch
        return job.loss(model(inputs), targets)

    torch.manual_seed(seed)
    optimizer = plain_optimizer(model, arguments["optimizer"], arguments["lr"], mup=mup)
    return strict(measure_coordinates(model, loss, batches, optimizer, arguments["steps"], progress=report))
