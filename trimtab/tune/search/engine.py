"""Tune: identical workers take trials from one journal, in this process, in many, or on many hosts at once.

There is no coordinator besides the journal: the same call on another host with the same shared folder joins in.
"""

from __future__ import annotations

import glob
import os
import platform
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from trimtab.compare import Progress
from trimtab.compare.pool import Pool
from trimtab.compare.store import write_results
from trimtab.errors import RunFailedError, UsageError, choose
from trimtab.tune.search.desk import Desk
from trimtab.tune.search.function_trial import Objective, find_objective, path_of
from trimtab.tune.search.samplers import SAMPLERS
from trimtab.tune.search.script_trial import script_plan
from trimtab.tune.search.slots import fill_slot
from trimtab.tune.search.space import Dimension, space_from
from trimtab.tune.search.tuning import Tuning, read_tuning
from trimtab.tune.search.workload_trial import workload_plan
from trimtab.workloads import Workload, parse_arm, workload

__all__ = ["tune"]

_MOST = 100_000
_TASK = "trimtab.tune.search.slots:serve_slot"


def tune(
    subject: str | Workload | Objective,
    space: Mapping[str, Dimension | str] | Iterable[str],
    *,
    trials: int,
    folder: str | Path,
    workers: int = 1,
    sampler: str = "tpe",
    seed: int = 0,
    metric: str = "loss",
    maximize: bool = False,
    prune: bool = True,
    median: bool = False,
    arm: str = "",
    steps: int | None = None,
    text: str | Path | None = None,
    arguments: Sequence[str] | None = None,
    pattern: str = "",
    progress: Callable[[Progress], None] | None = None,
) -> Tuning:
    """Search a space of hyper-parameters and return every trial, with what the doctor found in it.

    Trials are kept in `folder`; the same call goes on from there, and the same call elsewhere at the same time joins
    in. A killed worker loses no trial that has ended, and its own is run again under its number.

    Args:
        subject: a workload or its name; the path of a script (with `arguments`); or a function that gets the running
            trial (`values`, `folder`, `suggest`, `report`) and returns the metric, itself or as
            `"package.module:function"`. Trials of several workers need a function that can be imported.
        space: dimensions by name, as objects or texts such as `"1e-4:1e-1:log"`; or a list of `NAME=...`.
        trials: how many there are to be in the folder in all, from 1; those that failed count, and no more are begun.
        folder: of the journal, the runs and the results.
        workers: processes; 1 runs all trials here.
        sampler: one of Optuna's: `"tpe"`, `"gp"`, `"qmc"` or `"random"`.
        seed: of the sampler; with one worker, trials are a function of it.
        metric: a test metric of the workload, or what a script or function calls its result.
        maximize: whether more is better.
        prune: whether a trial with a critical loss-divergence or a non-finite loss is stopped. Stopped or not, it
            counts as its value at initialisation and stays among the trials.
        median: whether a trial that is behind the median of the earlier ones at the same step is stopped too; it
            then cannot be the best. Off by default: what counts is the loss at the end of a schedule.
        arm: settings of every trial of a workload, such as `"sgd,clip=1"`.
        steps: of every trial of a workload; its own if left out.
        text: a file or folder of text, for language models.
        arguments: a script's command line; `{NAME}` stands for a value. An empty list for a script without any.
        pattern: a regular expression with one group that finds the metric in a script's output.
        progress: called as trials move and end.

    Returns:
        The trials.

    Raises:
        UsageError: if something is not usable, or the folder holds a tuning of something else.
        RunFailedError: if all trials ended without a value.
        RecordError: if the folder cannot be written.
        MissingExtraError: if optuna is not installed.
        KeyboardInterrupt: on Ctrl-C; the trials that have ended are kept.

    Example:
        >>> import tempfile
        >>> def square(trial):
        ...     return (trial.values["x"] - 1) ** 2
        >>> found = tune(square, {"x": "-2:2"}, trials=20, folder=tempfile.mkdtemp())
        >>> len(found.trials), found.best.value < 0.5
        (20, True)
    """
    if workers < 1:
        raise UsageError(f"workers must be at least 1, got {workers}.")
    plan, objective, length = planned(
        subject,
        space,
        trials=trials,
        sampler=sampler,
        seed=seed,
        metric=metric,
        maximize=maximize,
        prune=prune,
        median=median,
        arm=arm,
        steps=steps,
        text=text,
        arguments=arguments,
        pattern=pattern,
    )
    if workers > 1 and plan["kind"] == "function":
        find_objective(plan["function"])
    with Desk(folder) as desk:
        desk.begin(plan)
        meter = Meters(desk, trials, length, progress)
        meter.ended("")
        if workers == 1:
            _here(desk, trials, objective, meter)
        else:
            _in_processes(desk, trials, workers, meter)
        return conclude(desk)


def planned(
    subject: str | Workload | Objective,
    space: Mapping[str, Dimension | str] | Iterable[str],
    *,
    trials: int,
    sampler: str = "tpe",
    seed: int = 0,
    metric: str = "loss",
    maximize: bool = False,
    prune: bool = True,
    median: bool = False,
    arm: str = "",
    steps: int | None = None,
    text: str | Path | None = None,
    arguments: Sequence[str] | None = None,
    pattern: str = "",
) -> tuple[dict[str, Any], Objective | None, int]:
    """Return a tuning's plan, the function if one is tuned, and the steps of a trial; see `tune` for the arguments.

    Raises:
        UsageError: if something is not usable.
    """
    if isinstance(trials, bool) or not isinstance(trials, int) or not 1 <= trials <= _MOST:
        raise UsageError(f"trials should be a whole number from 1 to {_MOST}, got {trials!r}.")
    dimensions = space_from(space)
    choose("sampler", sampler, SAMPLERS)
    if not 0 <= seed < 2**63:
        raise UsageError(f"seed should be from 0 to 2**63 - 1, got {seed}.")
    known, objective, length = _known(
        subject, dimensions, metric=metric, arm=arm, steps=steps, text=text, arguments=arguments, pattern=pattern
    )
    if known["kind"] == "workload" and maximize != ("accuracy" in metric):
        raise UsageError(f"{metric} {'should not' if maximize else 'should'} be maximized: change maximize.")
    plan = {
        **known,
        "space": {name: dimension.to_json() for name, dimension in dimensions.items()},
        "metric": metric,
        "maximize": maximize,
        "sampler": sampler,
        "seed": seed,
        "prune": prune,
        "median": median,
    }
    return plan, objective, length


def conclude(desk: Desk) -> Tuning:
    """Return what a tuning found, and write it as `tune.json`.

    Raises:
        RunFailedError: if no trial has a value.
        UsageError: if another file has that name.
        RecordError: if it cannot be written.
    """
    found = read_tuning(desk)
    write_results(desk.folder / "tune.json", "tuning", found.to_json())
    if found.best is None:
        first = next((trial for trial in found.trials if trial.reason), None)
        why = f": trial {first.number}: {first.reason}" if first else ""
        raise RunFailedError(f"none of {len(found.trials)} trials in {desk.folder} gave a value{why}")
    return found


def _known(
    subject: str | Workload | Objective,
    space: Mapping[str, Dimension],
    *,
    metric: str,
    arm: str,
    steps: int | None,
    text: str | Path | None,
    arguments: Sequence[str] | None,
    pattern: str,
) -> tuple[dict[str, Any], Objective | None, int]:
    """Return the subject's part of the plan, the function if it is one, and the steps of a trial as far as is known."""
    if isinstance(subject, Workload):
        subject = subject.name
    if isinstance(subject, str) and arguments is None and ":" not in subject:
        job = workload(subject)
        if not space:
            raise UsageError("the space is empty: give at least one range or choice.")
        base = parse_arm(arm, job.defaults) if arm else job.defaults
        base = base if steps is None else base.replace(steps=steps)
        if pattern:
            raise UsageError("the metric's pattern belongs to scripts: a workload reports its metric itself.")
        return workload_plan(subject, base, space, metric=metric, text=text), None, base.steps
    for name, value in (("arm", arm or None), ("steps", steps), ("text", text)):
        if value is not None:
            raise UsageError(f"{name} belongs to workloads: a script or a function sets its own.")
    if isinstance(subject, str) and arguments is not None:
        return script_plan(subject, arguments, space, pattern=pattern), None, 1
    if pattern:
        raise UsageError("the metric's pattern belongs to scripts: a function returns its metric.")
    if isinstance(subject, str):
        return {"kind": "function", "function": subject}, find_objective(subject), 1
    return {"kind": "function", "function": path_of(subject)}, subject, 1


def _here(desk: Desk, trials: int, objective: Objective | None, meter: Meters) -> None:
    """Run trials in this process until there are enough."""
    try:
        while (ending := fill_slot(desk, trials, meter.mine, objective)) is not None:
            meter.ended(f"trial {ending['number']}")
    except KeyboardInterrupt:
        desk.release(desk.worker)
        raise


def _in_processes(desk: Desk, trials: int, workers: int, meter: Meters) -> None:
    """Run trials in worker processes until there are enough; a process that dies is replaced."""
    host = f"{platform.node() or 'host'}-{os.getpid()}"
    own = desk.folder / "workers" / host
    try:
        while (left := trials - desk.finished()) > 0:
            arguments = {"folder": str(desk.folder.resolve()), "trials": trials, "host": host}
            orders = [{"key": f"slot-{place}", "task": _TASK, "arguments": arguments} for place in range(left)]
            with Pool(own, min(workers, left)) as pool:
                failures = pool.run(orders, meter)
            # Slots whose process died twice count one more attempt for their trial, which ends this in time.
            for reason in failures.values():
                if "died" not in reason and "killed" not in reason and "exited" not in reason:
                    raise RunFailedError(f"a worker failed: {reason}")
    except KeyboardInterrupt:
        desk.release(f"{host}-")
        raise
    shutil.rmtree(own, ignore_errors=True)
    for lease in own.parent.glob(f"{glob.escape(host)}-*.lease"):  # of workers that the pool has ended
        lease.unlink(missing_ok=True)


class Meters:
    """Turn what workers say into `Progress`; also the listener of a pool.

    Args:
        desk: to count the trials that have ended, those of other hosts too.
        trials: in all.
        length: steps of a trial.
        progress: hears of it.
    """

    def __init__(self, desk: Desk, trials: int, length: int, progress: Callable[[Progress], None] | None) -> None:
        self._desk = desk
        self._trials = trials
        self._length = length
        self._progress = progress
        self._running: dict[str, int] = {}
        self._done = 0

    def mine(self, step: int, loss: float) -> None:
        """A trial of this process made a step."""
        self.moved("", step, loss)

    def moved(self, key: str, step: int, loss: float) -> None:
        """A trial made a step."""
        self._running[key] = min(step, self._length - 1)
        self._tell(key, loss)

    def ended(self, key: str) -> None:
        """A trial ended."""
        self._running.pop(key, None)
        self._running.pop("", None)
        if self._progress is not None:
            self._done = min(self._trials, self._desk.finished())
            self._tell(key)

    def note(self, key: str, text: str) -> None:
        """Something out of the ordinary happened."""
        self._running.pop(key, None)
        self._tell(key, note=text.replace("trying once more", "its trial is run again"))

    def _tell(self, key: str, loss: float = float("nan"), note: str = "") -> None:
        if self._progress is None:
            return
        total = self._trials * self._length
        steps = min(total, self._done * self._length + sum(self._running.values()))
        name = "a trial" if key.startswith("slot-") or not key else key
        at = self._running.get(key, 0)
        self._progress(Progress(self._done, self._trials, steps, total, name, at, loss, note))
