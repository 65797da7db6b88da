"""`trimtab train`: train a workload with the watch on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trimtab.cli.show import Interrupted, Meter, say, use_threads
from trimtab.errors import UsageError

if TYPE_CHECKING:
    from trimtab.workloads import Outcome

_RUNS = Path("runs")


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("train")(train)
    app.command("branch")(branch)


def train(
    name: Annotated[str, typer.Argument(help="A workload, as trimtab workloads lists them.")],
    lr: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Samples a step; 0 for all.")] = None,
    optimizer: Annotated[str | None, typer.Option(help="adamw or sgd of torch, or one of the catalogue.")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="Weight decay.")] = None,
    clip: Annotated[float | None, typer.Option(help="Largest gradient norm; 0 turns clipping off.")] = None,
    warmup: Annotated[float | None, typer.Option(help="Fraction of the steps for warm-up.")] = None,
    schedule: Annotated[str | None, typer.Option(help="cosine, constant or one of the catalogue, such as wsd.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of weights and batches.")] = None,
    remedies: Annotated[list[str] | None, typer.Option("--with", help="A method to apply; may be repeated.")] = None,
    others: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="NAME=VALUE of any other setting, option of the optimizer or schedule.OPTION; may be repeated.",
        ),
    ] = None,
    text: Annotated[Path | None, typer.Option(help="A file or folder of text, for language models.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the run; runs/NAME-1, -2, ... by default.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint in --out.")] = False,
    checkpoint_every: Annotated[int, typer.Option(help="Steps between checkpoints; 0 for one at the end.", min=0)] = 0,
    keep: Annotated[int, typer.Option(help="How many of the newest checkpoints stay.", min=1)] = 2,
    no_watch: Annotated[bool, typer.Option("--no-watch", help="Record loss and learning rate only.")] = False,
    threads: Annotated[int, typer.Option(help="Threads of torch.", min=1, max=1024)] = 1,
) -> None:
    """Train a workload, record its signals. Exit code 1 if the run diverges."""
    from trimtab.workloads import train as run
    from trimtab.workloads import workload

    if resume and out is None:
        raise UsageError("--resume needs the folder of the run to continue: give it with --out.")
    use_threads(threads)
    job = workload(name)
    changes: dict[str, Any] = {
        "lr": lr,
        "steps": steps,
        "batch_size": batch_size,
        "optimizer": optimizer,
        "weight_decay": weight_decay,
        "clip": clip,
        "warmup": warmup,
        "schedule": schedule,
        "seed": seed,
        "remedies": (*job.defaults.remedies, *remedies) if remedies else None,
    }
    changes = {key: value for key, value in changes.items() if value is not None}
    for key, value in map(_setting, others or ()):
        if key in changes:
            raise UsageError(f"{key} is given twice: once is enough.")
        changes[key] = value
    settings = job.defaults.replace(**changes)
    folder = out if out is not None else _next_folder(name)
    try:
        with Meter(name, settings.steps) as meter:
            outcome = run(
                job,
                settings,
                out=folder,
                watch=not no_watch,
                resume=resume,
                checkpoint_every=checkpoint_every,
                keep=keep,
                progress=lambda step, total, loss: meter.update(step, total, f"loss {loss:.4f}"),
                text=text,
            )
    except KeyboardInterrupt:
        raise Interrupted(
            f"interrupted: the run is kept in {folder}, the same command with --resume --out {folder} continues it."
        ) from None
    say(_summary(outcome, folder))
    if outcome.diverged:
        raise typer.Exit(1)


def branch(
    run: Annotated[Path, typer.Argument(help="Folder of a run with schedule=wsd or constant, and checkpoints.")],
    decay: Annotated[int, typer.Option(help="Steps of the decay.", min=1)],
    at: Annotated[int | None, typer.Option(help="Steps after which it leaves; the newest checkpoint.")] = None,
    form: Annotated[str | None, typer.Option(help="linear, 1-sqrt, cosine or exponential; the run's.")] = None,
    floor: Annotated[float | None, typer.Option(help="Last factor; the run's.")] = None,
    text: Annotated[Path | None, typer.Option(help="The text that the run was trained on, if it had one.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the branch; RUN-branch-DECAY by default.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the branch in --out.")] = False,
    checkpoint_every: Annotated[int, typer.Option(help="Steps between checkpoints; 0 for one at the end.", min=0)] = 0,
    threads: Annotated[int, typer.Option(help="Threads of torch.", min=1, max=1024)] = 1,
) -> None:
    """Decay from a checkpoint of a run's stable phase, and leave the run as it is. Exit code 1 if it diverges."""
    from trimtab.workloads import branch as decayed

    use_threads(threads)
    place = "" if at is None else f"-at-{at}"
    folder = out if out is not None else run.with_name(f"{run.name}-branch{place}-{decay}")
    try:
        with Meter(f"branch of {run.name}") as meter:
            outcome = decayed(
                run,
                decay=decay,
                out=folder,
                at=at,
                form=form,
                floor=floor,
                resume=resume,
                checkpoint_every=checkpoint_every,
                progress=lambda step, total, loss: meter.update(step, total, f"loss {loss:.4f}"),
                text=text,
            )
    except KeyboardInterrupt:
        raise Interrupted(
            f"interrupted: the branch is kept in {folder}, the same command with --resume continues it."
        ) from None
    say(_summary(outcome, folder))
    if outcome.diverged:
        raise typer.Exit(1)


def _setting(text: str) -> tuple[str, str]:
    name, equals, value = (part.strip() for part in text.partition("="))
    if not (name and equals and value):
        raise UsageError(f"cannot read --set {text!r}: write NAME=VALUE, such as --set beta2=0.99.")
    return name, value


def _summary(outcome: Outcome, folder: Path) -> str:
    cost = f"{1000 * outcome.cpu_seconds_per_step:.3g} CPU ms per step"
    if outcome.diverged:
        return (
            f"{outcome.workload}: diverged after {outcome.steps} steps (its loss or gradient is not finite), {cost}; "
            f"trimtab doctor {folder} names the cause"
        )
    metrics = ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in outcome.metrics.items())
    return (
        f"{outcome.workload}: {metrics} (loss {outcome.initial_loss:.4f} at initialisation), {outcome.steps} steps, "
        f"{cost}; recorded in {folder}"
    )


def _next_folder(name: str) -> Path:
    """Return the first of runs/NAME-1, runs/NAME-2, ... that does not exist."""
    number = 1
    while (_RUNS / f"{name}-{number}").exists():
        number += 1
    return _RUNS / f"{name}-{number}"
