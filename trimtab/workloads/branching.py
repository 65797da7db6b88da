"""Branch a run: decay from a checkpoint of its stable phase, and leave the run itself as it is."""

from __future__ import annotations

import math
from pathlib import Path

from trimtab.errors import UsageError
from trimtab.record import Run
from trimtab.record.checkpoint import checkpoints, step_of
from trimtab.workloads.outcome import Outcome
from trimtab.workloads.schedules import shape
from trimtab.workloads.session import Progress
from trimtab.workloads.settings import Settings
from trimtab.workloads.training import train


def branched(
    settings: Settings, at: int, *, decay: int, form: str | None = None, floor: float | None = None
) -> Settings:
    """Return the settings of a run that leaves the stable phase of another after `at` steps and decays.

    Up to step `at` both have the same learning rates.

    Args:
        settings: of a run with `schedule=wsd` or `schedule=constant`.
        at: steps taken when it leaves, in the stable phase.
        decay: steps of the decay, at least 1.
        form: of the decay; default that of the run, or `wsd`'s.
        floor: last factor; default that of the run, or `wsd`'s.

    Raises:
        UsageError: if the run's schedule has no stable phase, or `at` is outside it.

    Example:
        >>> run = Settings(lr=0.1, steps=100, warmup=0.1, schedule="wsd")
        >>> early = branched(run, 50, decay=10)
        >>> early.steps, early.learning_rate(49) == run.learning_rate(49), early.learning_rate(59)
        (60, True, 0.005...)
    """
    if settings.schedule not in ("wsd", "constant"):
        raise UsageError(f"only runs with schedule=wsd or constant can branch, this one has {settings.schedule}.")
    if settings.schedule == "wsd":
        facts = dict(shape("wsd", settings.schedule_options, settings.steps, settings.warmup, settings.beta2).facts)
    else:
        facts = {"warmup": math.ceil(settings.warmup * settings.steps), "decay": 0}
    last = settings.steps - facts["decay"]
    if not facts["warmup"] <= at <= last:
        raise UsageError(f"at must be in the stable phase, steps {facts['warmup']} to {last}, got {at}.")
    asked = {"form": form, "floor": floor}
    chosen = {name: value if value is not None else facts.get(name) for name, value in asked.items()}
    options = {"warmup": facts["warmup"], "decay": decay, **chosen}
    return settings.replace(
        schedule="wsd",
        steps=at + decay,
        schedule_options={name: value for name, value in options.items() if value is not None},
    )


def branch(
    run: str | Path,
    *,
    decay: int,
    out: str | Path,
    at: int | None = None,
    form: str | None = None,
    floor: float | None = None,
    watch: bool = True,
    resume: bool = False,
    checkpoint_every: int = 0,
    progress: Progress | None = None,
    text: str | Path | None = None,
) -> Outcome:
    """Decay from a checkpoint of a recorded run, in a folder of its own; the run and its folder stay as they are.

    One long run with a constant learning rate thus gives the end of a run of any length for the price of its decay
    alone (Hu et al. 2024, arXiv:2404.06395; Hägele et al. 2024, arXiv:2405.18392). The outcome is bit-equal to that of
    a run which had had these settings from its first step.

    Args:
        run: the folder of a run with `schedule=wsd` or `constant`, and with checkpoints (`checkpoint_every`, `keep`).
        decay: steps of the decay, at least 1.
        out: folder of the branch.
        at: steps after which it leaves; default the newest checkpoint of the stable phase.
        form: of the decay; default that of the run, or `wsd`'s.
        floor: last factor; default that of the run, or `wsd`'s.
        watch: as for `train`.
        resume: continue the branch in `out`.
        checkpoint_every: as for `train`.
        progress: as for `train`.
        text: the text that the run was trained on, if it had one.

    Returns:
        The outcome of the branch.

    Raises:
        UsageError: if the run has no stable phase, or no checkpoint there.
        RecordError: if a folder cannot be read or written.
    """
    with Run(run) as record:
        meta = record.meta
    if "workload" not in meta or "config" not in meta:
        raise UsageError(f"{run} is no run of a workload: branch one that 'trimtab train' has recorded.")
    settings = Settings(**meta["config"])
    places = {step_of(path): path for path in checkpoints(run)}
    chosen = at
    if chosen is None:
        stable = [step for step in places if _is_stable(settings, step)]
        if not stable:
            raise UsageError(
                f"{run} has no checkpoint in its stable phase: train it with --checkpoint-every and --keep."
            )
        chosen = max(stable)
    wanted = branched(settings, chosen, decay=decay, form=form, floor=floor)
    if chosen not in places:
        found = ", ".join(map(str, sorted(places))) or "none"
        raise UsageError(f"{run} has no checkpoint after {chosen} steps, only after: {found}.")
    return train(
        meta["workload"],
        wanted,
        out=out,
        watch=watch,
        resume=resume,
        checkpoint_every=checkpoint_every,
        start=places[chosen],
        progress=progress,
        text=text,
    )


def _is_stable(settings: Settings, step: int) -> bool:
    try:
        branched(settings, step, decay=1)
    except UsageError:
        return False
    return True
