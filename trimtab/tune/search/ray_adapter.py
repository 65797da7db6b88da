"""The same trials as tasks of a Ray cluster: its machines fill the slots, the journal stays what they share."""

from __future__ import annotations

import importlib
import platform
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from trimtab.compare import Progress
from trimtab.errors import RunFailedError, UsageError, require
from trimtab.tune.search.desk import Desk
from trimtab.tune.search.engine import Meters, conclude, planned
from trimtab.tune.search.tuning import Tuning

__all__ = ["tune_on_ray"]


def tune_on_ray(
    subject: Any,
    space: Any,
    *,
    trials: int,
    folder: str | Path,
    workers: int = 0,
    cpus: float = 1.0,
    gpus: float = 0.0,
    progress: Callable[[Progress], None] | None = None,
    **options: Any,
) -> Tuning:
    """Search a space as `trimtab.tune.tune` does, each trial a task of Ray.

    Ray decides where a task runs and starts one again whose machine is lost; trials are taken, seeded and handed in
    through the journal, as everywhere. The folder must be one that all of the cluster's machines share. Ray is started
    on this machine if it is not running; connect to a cluster by `ray.init(address=...)` before.

    Args:
        subject: see `trimtab.tune.tune`; a function must be one that can be imported.
        space: likewise.
        trials: how many there are to be in the folder in all.
        folder: of the journal, the runs and the results.
        workers: tasks at a time; 0 for as many as the cluster has room for.
        cpus: that a task takes.
        gpus: that a task takes.
        progress: called as trials end.
        **options: of `trimtab.tune.tune`: `sampler`, `seed`, `metric`, `maximize`, `prune`, `median`, `arm`, `steps`,
            `text`, `arguments`, `pattern`.

    Returns:
        The trials.

    Raises:
        UsageError: if something is not usable, or the folder holds a tuning of something else.
        RunFailedError: if all trials ended without a value, or tasks failed.
        RecordError: if the folder cannot be written.
        MissingExtraError: if ray or optuna is not installed.
    """
    ray = require("ray", extra="ray")
    plan, _, length = planned(subject, space, trials=trials, **options)
    if plan["kind"] == "function" and ":" not in plan["function"]:
        raise UsageError(f"{plan['function']} cannot be imported on other machines: give 'package.module:function'.")
    if not ray.is_initialized():
        ray.init(include_dashboard=False, log_to_driver=False)
    task = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=2)(_slot)
    host = f"ray-{platform.node() or 'host'}"
    with Desk(folder) as desk:
        desk.begin(plan)
        meter = Meters(desk, trials, length, progress)
        meter.ended("")
        order = {"folder": str(desk.folder.resolve()), "trials": trials, "host": host}
        room = workers or max(1, int(ray.cluster_resources().get("CPU", 1) / cpus) if cpus else 1)
        running: list[Any] = []
        while desk.finished() < trials:
            # One that waits for the last trials of others costs nothing: it takes over if their machine is lost.
            while len(running) < min(room, trials - desk.finished()):
                running.append(task.remote(order))
            ended, running = ray.wait(running, num_returns=1)
            for reference in ended:
                try:
                    ray.get(reference)
                except ray.exceptions.RayError as error:
                    line = str(error).strip().splitlines()[-1:] or [type(error).__name__]
                    raise RunFailedError(f"a task of Ray failed: {line[0]}") from error
                meter.ended("")
        return conclude(desk)


def _slot(order: Mapping[str, Any]) -> Mapping[str, Any]:
    """Fill one slot in one of Ray's processes."""
    serve: Callable[..., Mapping[str, Any]] = importlib.import_module("trimtab.tune.search.slots").serve_slot
    return serve(order, None, lambda step, loss: None)
