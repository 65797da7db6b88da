"""A slot: one trial taken, run and handed in. Every worker, wherever it runs, does nothing but fill slots."""

from __future__ import annotations

import atexit
import contextlib
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from trimtab.tune.search.desk import Desk, Ticket
from trimtab.tune.search.function_trial import Objective, find_objective, run_function_trial
from trimtab.tune.search.ongoing import Tell
from trimtab.tune.search.script_trial import end_leftover, run_script_trial
from trimtab.tune.search.workload_trial import draw_values, run_workload_trial

_LOOK = 0.5
"""Seconds between two looks at trials that run elsewhere."""

_DESKS: dict[tuple[str, str], Desk] = {}


def trial_folder(folder: Path, number: int) -> Path:
    """Return the folder of a trial's run."""
    return folder / "runs" / f"trial-{number}"


def fill_slot(
    desk: Desk, trials: int, tell: Tell, objective: Objective | None = None, *, patient: bool = True
) -> dict[str, Any] | None:
    """Take a trial, run it and hand it in.

    Args:
        desk: the worker's.
        trials: how many there are to be in all.
        tell: hears of the trial's steps and losses.
        objective: what a trial of a function calls; found by its import path if left out.
        patient: whether to wait while all that is left runs elsewhere: should one of those workers die, its trial is
            run here.

    Returns:
        How it ended, with its `number`; None if there was nothing left to do.

    Raises:
        UsageError: if the folder holds no tuning.
        RecordError: if the folder cannot be written.
    """
    plan = desk.plan

    def wait() -> bool:
        time.sleep(_LOOK)
        return patient

    ticket = desk.claim(trials, lambda trial: draw_values(plan, trial), wait=wait)
    if ticket is None:
        return None
    own = trial_folder(desk.folder, ticket.number)
    end_leftover(own)
    shutil.rmtree(own, ignore_errors=True)  # what an earlier attempt left has no result
    began = time.monotonic()
    ending = _run(plan, ticket, own, tell, objective)
    ending["seconds"] = round(time.monotonic() - began, 3)
    ending.setdefault("values", dict(ticket.values))
    desk.finish(ticket, ending)
    return {"number": ticket.number, **ending}


def _run(
    plan: Mapping[str, Any], ticket: Ticket, folder: Path, tell: Tell, objective: Objective | None
) -> dict[str, Any]:
    if plan["kind"] == "workload":
        return run_workload_trial(plan, ticket, folder, tell)
    if plan["kind"] == "script":
        return run_script_trial(plan, ticket, folder, tell)
    return run_function_trial(plan, ticket, folder, tell, objective or find_objective(plan["function"]))


def serve_slot(
    arguments: Mapping[str, Any], folder: Path | None, report: Callable[[int, float], None]
) -> dict[str, Any]:
    """Fill one slot in a worker process; the task that `trimtab.compare.pool` gives to its workers.

    The desk stays open between slots, so that a process reads the journal once.

    Args:
        arguments: `folder` of the tuning, `trials` in all and the `host`'s name for its workers.
        folder: of the slot itself, which it leaves alone.
        report: hears of steps and losses.
    """
    key = (arguments["folder"], arguments["host"])
    if key not in _DESKS:
        _DESKS[key] = Desk(arguments["folder"], _worker_name(arguments["host"]))
        atexit.register(_DESKS[key].close)
    with _single_thread():
        return fill_slot(_DESKS[key], arguments["trials"], report) or {}


def _worker_name(host: str) -> str:
    return f"{host}-{time.time_ns() % 10**12}-{threading.get_native_id()}"


@contextlib.contextmanager
def _single_thread() -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
