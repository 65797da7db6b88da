"""Trials that train a workload: their settings, their arms, and one run with the default watch for each."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trimtab.compare.arm import Arm
from trimtab.compare.training import prepared
from trimtab.errors import RecordError, UsageError, choose
from trimtab.tune.search.desk import Ticket
from trimtab.tune.search.ending import behind, failed, finished, lost
from trimtab.tune.search.ongoing import Stopped, Tell
from trimtab.tune.search.space import Dimension, Suggests, Value, dimension_from_json
from trimtab.tune.search.verdict import Losses, fatal_in, findings_in, mark_stopped, merged
from trimtab.workloads import Settings, Workload, train

_SWITCHES = ("optimizer", "schedule")
"""Settings on whose value it depends which others there are."""
_NO_REMEDY = "none"
_FORBIDDEN = ("seed", "remedies", "options", "schedule_options")
_WITHIN = 3
"""The median rule looks at no run before this part of its steps: the losses of a warm-up say little."""


def workload_plan(
    name: str, base: Settings, space: Mapping[str, Dimension], *, metric: str, text: str | Path | None
) -> dict[str, Any]:
    """Return what trials of a workload need to know, after the ends of the space have been tried out on new models.

    Args:
        name: of the workload.
        base: settings of every trial, but for those in the space.
        space: dimensions by the name of a setting or of an optimizer's or schedule's option; `with` chooses remedies.
        metric: a test metric of the workload.
        text: a file or folder of text, for language models.

    Raises:
        UsageError: if a name is unknown, a value breaks its rule, or the workload has no such metric.
    """
    job = prepared(name, text)
    for parameter in space:
        if parameter in _FORBIDDEN:
            hint = "choose remedies by with=none,NAME" if parameter == "remedies" else "leave it out"
            raise UsageError(f"{parameter} cannot be in the space: {hint}.")
    applies = _applies(job, base, space)
    metrics = job.evaluate(job.model(base.seed, width=base.width, depth=base.depth))
    choose(f"metric of {name}", metric, [key for key, value in metrics.items() if math.isfinite(value)])
    return {
        "kind": "workload",
        "workload": name,
        "base": base.model_dump(mode="json"),
        "text": None if text is None else str(Path(text).resolve()),
        "data": job.data.sha256,
        "applies": applies,
        "initial": metrics[metric],
    }


def _applies(job: Workload, base: Settings, space: Mapping[str, Dimension]) -> dict[str, list[list[str]]]:
    """Return with which values of the switches each other name goes; all ends must go with some."""
    switches = [name for name in _SWITCHES if name in space]
    combinations = [
        dict(zip(switches, map(str, values), strict=True))
        for values in itertools.product(*(space[name].ends for name in switches))
    ]
    for combination in combinations:
        _try(job, base, combination)
    found = {}
    for name, dimension in space.items():
        if name in switches:
            continue
        refusals: list[tuple[int, UsageError]] = []
        fits = []
        for combination in combinations:
            accepted = 0
            try:
                for value in dimension.ends:
                    _try(job, base, {**combination, name: value})
                    accepted += 1
            except UsageError as error:
                refusals.append((accepted, error))
            else:
                fits.append([combination[switch] for switch in switches])
        if not fits:
            # What took one end and not the other says more than what does not know the name.
            raise max(refusals, key=lambda refusal: refusal[0])[1]
        found[name] = fits
    return found


def _try(job: Workload, base: Settings, values: Mapping[str, Value]) -> None:
    Arm("", _settings(base, values)).check(job)


def _settings(base: Settings, values: Mapping[str, Value]) -> Settings:
    changes = {name: value for name, value in values.items() if name != "with"}
    remedies = str(values.get("with", _NO_REMEDY))
    if remedies != _NO_REMEDY:
        changes["remedies"] = (*base.remedies, *remedies.split("+"))  # type: ignore[assignment]
    return base.replace(**changes)


def draw_values(plan: Mapping[str, Any], trial: Suggests) -> dict[str, Value]:
    """Draw the values of a trial: the switches first, then what goes with them, in the order of the space."""
    space = {name: dimension_from_json(data) for name, data in plan["space"].items()}
    applies: Mapping[str, list[list[str]]] = plan.get("applies") or {}
    switches = [name for name in _SWITCHES if name in space and name not in applies] if applies else []
    values = {name: space[name].suggest(trial, name) for name in switches}
    chosen = [str(values[name]) for name in switches]
    for name, dimension in space.items():
        if name not in values and (name not in applies or chosen in applies[name]):
            values[name] = dimension.suggest(trial, name)
    return values


def arm_text(settings: Settings, defaults: Settings, *, steps: bool = False) -> str:
    """Return the arm that stands for settings; it can be given to `trimtab compare` and to `parse_arm`.

    Args:
        settings: those to describe.
        defaults: the workload's.
        steps: whether the number of steps belongs to it.

    Example:
        >>> defaults = Settings(lr=0.01, steps=10)
        >>> arm_text(defaults.replace(lr=0.02, weight_decay=0.1), defaults)
        'adamw,lr=0.02,weight_decay=0.1'
    """
    switched = defaults.replace(optimizer=settings.optimizer, schedule=settings.schedule)
    parts = [settings.optimizer]
    if settings.schedule != defaults.schedule:
        parts.append(f"schedule={settings.schedule}")
    left_out = {"optimizer", "schedule", *_FORBIDDEN} | (set() if steps else {"steps"})
    for name in Settings.model_fields:
        value = getattr(settings, name)
        if name not in left_out and value != getattr(switched, name):
            parts.append(f"{name}={_shown(value)}")
    for name, value in settings.options:
        if (name, value) not in switched.options:
            prefix = "optimizer." if name in Settings.model_fields else ""
            parts.append(f"{prefix}{name}={_shown(value)}")
    for name, value in settings.schedule_options:
        if (name, value) not in switched.schedule_options:
            parts.append(f"schedule.{name}={_shown(value)}")
    parts += [f"with={name}" for name in settings.remedies if name not in defaults.remedies]
    return ",".join(parts)


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) or value is None else str(value)


@functools.lru_cache(maxsize=1)
def _job(name: str, text: str | None) -> Workload:
    return prepared(name, text)


def run_workload_trial(plan: Mapping[str, Any], ticket: Ticket, folder: Path, tell: Tell) -> dict[str, Any]:
    """Train once, with the default watch, and return how it ended.

    A run whose loss diverges for good is stopped at one of its evaluations; the doctor examines every record.

    Args:
        plan: the tuning's.
        ticket: the trial.
        folder: of the run.
        tell: hears of its steps.

    Raises:
        RecordError: if the folder cannot be written.
    """
    job = _job(plan["workload"], plan["text"])
    try:
        settings = _settings(Settings(**plan["base"]), ticket.values)
    except UsageError as error:
        return failed(str(error))
    more = {"arm": arm_text(settings, job.defaults, steps="steps" in plan["space"])}
    classes = {} if job.data.train_targets.is_floating_point() else {"n_classes": 0}
    losses = Losses(classes)
    every = max(1, settings.steps // job.evaluations)

    def progress(step: int, steps: int, loss: float) -> None:
        losses.add(step - 1, loss)
        tell(step, loss)
        if step % every or step == steps or not plan["prune"]:
            return
        if (finding := losses.fatal()) is not None:
            raise Stopped(step, f"{finding['name']}: {finding['cause']}", finding)
        if plan["median"] and step * _WITHIN >= steps:
            recent = sum(losses.values[-every:]) / every
            ticket.trial.report(-recent if plan["maximize"] else recent, step)
            if ticket.trial.should_prune():
                raise Stopped(step, f"its training loss at step {step} is above the median of the trials before it")

    try:
        outcome = train(job, settings, out=folder, text=plan["text"], progress=progress)
    except Stopped as stop:
        mark_stopped(folder, stop.step, str(stop), lost=stop.finding is not None)
        findings = merged(findings_in(folder), stop.finding)
        if stop.finding is None:
            last = losses.values[-1] if plan["metric"] == "loss" else plan["initial"]
            return behind(last, str(stop), findings, steps=stop.step, **more)
        return lost(_initial(plan, folder), stop.finding, findings, steps=stop.step, **more)
    except RecordError:
        raise
    except Exception as error:  # a trial that raises is a result, not the end of the tuning
        text = str(error) if isinstance(error, UsageError) else f"{type(error).__name__}: {error}"
        return failed(text, findings_in(folder), **more)
    findings = findings_in(folder)
    more["steps"] = outcome.steps  # type: ignore[assignment]
    initial = outcome.initial_loss if plan["metric"] == "loss" else plan["initial"]
    value = outcome.metrics.get(plan["metric"], math.nan)
    if outcome.diverged or not math.isfinite(value):
        return lost(initial, fatal_in(findings), findings, **more)
    return finished(plan, value, initial, findings, metrics=outcome.metrics, **more)


def _initial(plan: Mapping[str, Any], folder: Path) -> float:
    from trimtab.record import Run

    if plan["metric"] != "loss":
        return float(plan["initial"])
    with Run(folder) as run:
        return float(run.meta.get("initial_loss", plan["initial"]))
