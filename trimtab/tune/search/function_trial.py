"""Trials that call a function: it gets the running trial and returns the metric."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from trimtab.errors import RecordError, UsageError
from trimtab.tune.search.desk import Ticket
from trimtab.tune.search.ending import behind, failed, finished, lost
from trimtab.tune.search.ongoing import Ongoing, Stopped, Tell
from trimtab.tune.search.verdict import fatal_in, findings_in, mark_stopped, merged, record_losses

Objective = Callable[[Ongoing], float]


def find_objective(path: str) -> Objective:
    """Return the function behind an import path `"package.module:function"`.

    Raises:
        UsageError: if there is none.
    """
    module, _, name = path.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UsageError(f"cannot import the objective {path!r}: {error}.") from None
    if not callable(found):
        raise UsageError(f"the objective {path!r} is not a function.")
    return found


def path_of(objective: Objective) -> str:
    """Return the import path of a function, or its name alone where other processes cannot import it.

    Example:
        >>> path_of(find_objective)
        'trimtab.tune.search.function_trial:find_objective'
    """
    module, name = getattr(objective, "__module__", ""), getattr(objective, "__qualname__", repr(objective))
    return f"{module}:{name}" if module and module != "__main__" and "." not in name else name


def run_function_trial(
    plan: Mapping[str, Any], ticket: Ticket, folder: Path, tell: Tell, objective: Objective
) -> dict[str, Any]:
    """Call the objective once and return how it ended.

    Args:
        plan: the tuning's.
        ticket: the trial.
        folder: where the trial may write.
        tell: hears of its reports.
        objective: what is called.

    Raises:
        RecordError: if the folder cannot be written.
    """
    trial = Ongoing(plan, ticket, folder, tell)
    try:
        value = float(objective(trial))
    except Stopped as stop:
        return stopped(trial, stop)
    except RecordError:
        raise
    except Exception as error:  # a trial that raises is a result, not the end of the tuning
        record_losses(folder, trial.losses)
        text = str(error) if isinstance(error, UsageError) else f"{type(error).__name__}: {error}"
        return failed(text, findings_in(folder), values=trial.values)
    return concluded(plan, trial, value)


def stopped(trial: Ongoing, stop: Stopped) -> dict[str, Any]:
    """Return the ending of a trial that its reports have stopped."""
    record_losses(trial.folder, trial.losses)
    mark_stopped(trial.folder, stop.step, str(stop), lost=stop.finding is not None)
    findings = merged(findings_in(trial.folder), stop.finding)
    if stop.finding is not None:
        return lost(trial.initial, stop.finding, findings, values=trial.values)
    latest = trial.latest
    return behind(math.nan if latest is None else latest, str(stop), findings, values=trial.values)


def concluded(plan: Mapping[str, Any], trial: Ongoing, value: float) -> dict[str, Any]:
    """Return the ending of a trial that came to its end with a value of the metric."""
    record_losses(trial.folder, trial.losses)
    findings = findings_in(trial.folder)
    if not math.isfinite(value):
        return lost(trial.initial, fatal_in(findings), findings, values=trial.values)
    return finished(plan, value, None, findings, values=trial.values)
