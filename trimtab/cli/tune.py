"""`trimtab tune`: search hyper-parameters of a workload or a script, and say why trials failed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trimtab.cli.plot import curves
from trimtab.cli.show import Interrupted, Meter, console, number, print_json, say, table, use_threads
from trimtab.errors import RunFailedError, UsageError

if TYPE_CHECKING:
    from trimtab.tune.search.tuning import TrialResult, Tuning

_SHOWN = 10
_COLUMNS = 8


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("tune")(tune)


def tune(
    subject: Annotated[
        str, typer.Argument(metavar="WORKLOAD|SCRIPT", help="As trimtab workloads lists them, or a Python file.")
    ],
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="[-- ARGS]", help="A script's; {NAME} is a value, {folder} the trial's folder."),
    ] = None,
    space: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=LOW:HIGH, NAME=LOW:HIGH:log, NAME=LOW:HIGH:int, NAME=LOW:HIGH:step=SIZE (also several, as "
            "16:128:int:log) or NAME=A,B,C; may be repeated. NAME is a setting or an option of the optimizer "
            "(with=none,qk-norm tries remedies), for scripts any word."
        ),
    ] = None,
    trials: Annotated[int, typer.Option(help="Trials in the folder in all; running again goes on up to them.")] = 20,
    workers: Annotated[int, typer.Option(help="Worker processes, one thread each; 1 runs here.")] = 2,
    sampler: Annotated[str, typer.Option(help="tpe, gp, qmc or random.")] = "tpe",
    seed: Annotated[int, typer.Option(help="Of the sampler.")] = 0,
    metric: Annotated[str, typer.Option(help="loss, accuracy, or what a script calls its result.")] = "loss",
    maximize: Annotated[bool, typer.Option("--maximize", help="More is better.")] = False,
    prune: Annotated[
        bool, typer.Option("--prune/--no-prune", help="Stop trials with a critical loss-divergence or non-finite.")
    ] = True,
    median: Annotated[bool, typer.Option("--median", help="Stop trials behind the median at the same step.")] = False,
    arm: Annotated[str, typer.Option(help="Settings of every trial, such as 'sgd,clip=1'.")] = "",
    steps: Annotated[int | None, typer.Option(help="Steps of every trial of a workload.")] = None,
    text: Annotated[Path | None, typer.Option(help="A file or folder of text, for language models.")] = None,
    metric_pattern: Annotated[
        str, typer.Option(help="Finds the metric in a script's output, such as 'val=([0-9.]+)'.")
    ] = "",
    out: Annotated[Path | None, typer.Option(help="Folder of journal, runs, results; runs/tune-NAME.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Search hyper-parameters; name the cause where trials fail. The same command elsewhere with the same --out joins.

    A script gives its metric by trimtab.trial.result, in a last line of JSON, or by --metric-pattern, and gets values
    by {NAME} in its arguments or by trimtab.trial.suggest. Exit code 1 if no trial gives a value.
    """
    use_threads()
    from trimtab.compare.store import read_json
    from trimtab.report.tuning import build_tuning_report
    from trimtab.tune.search.engine import tune as run

    script = subject.endswith(".py") or "/" in subject
    if arguments and not script:
        raise UsageError(f"{subject} is no script, so it takes no arguments: leave out {arguments[0]!r}.")
    folder = out or Path("runs") / f"tune-{Path(subject).stem}"
    if not script and not space:
        raise UsageError("give the space: --space NAME=LOW:HIGH, such as --space lr=1e-4:1e-1:log.")
    try:
        with Meter(f"tuning {subject}") as meter:
            found = run(
                subject,
                space or [],
                trials=trials,
                folder=folder,
                workers=workers,
                sampler=sampler,
                seed=seed,
                metric=metric,
                maximize=maximize,
                prune=prune,
                median=median,
                arm=arm,
                steps=steps,
                text=text,
                arguments=(arguments or []) if script else None,
                pattern=metric_pattern,
                progress=meter.jobs,
            )
    except KeyboardInterrupt:
        raise Interrupted(
            f"interrupted: trials that ended are kept in {folder}, the same command goes on from there."
        ) from None
    except RunFailedError:
        # Without a best trial there is no table, but why the trials failed is what the page is for.
        if (document := read_json(folder / "tune.json")) is not None:
            build_tuning_report(document, folder / "tune.html")
        raise
    build_tuning_report(found.to_json(), folder / "tune.html")
    if json:
        print_json(_json(found))
        return
    print_tuning(found)
    say(f"runs, tune.json and tune.html: {folder}")


def _json(found: Tuning) -> dict[str, Any]:
    from trimtab.compare.store import strict

    return {"kind": "tuning", **strict(found.to_json())}


def print_tuning(found: Tuning) -> None:
    """Print the best trials, how the best value fell over time, and why trials failed."""
    best = found.best
    if best is None:
        raise RunFailedError("no trial has a value.")
    names = list(dict.fromkeys(name for trial in found.trials for name in trial.values))
    shown = names[:_COLUMNS]
    rows = [
        [str(trial.number), *(_value(trial.values.get(name)) for name in shown), trial.status, _why(trial),
         number(trial.value, 5)]
        for trial in found.ranking[:_SHOWN]
    ]  # fmt: skip
    metric = found.plan["metric"]
    counts = ", ".join(f"{count} {status}" for status, count in found.counts.items())
    title = f"{found.subject}: best of {len(found.trials)} trials by {metric} ({counts})"
    console().print(table(title, ["trial", *shown, "status", "findings", metric], rows, left=len(shown) + 3))
    _plot(found)
    failed = [trial for trial in found.trials if trial.status == "failed"]
    if found.findings or failed:
        rows = [
            [name, row["severity"], _numbers(row["trials"]), str(row["count"])] for name, row in found.findings.items()
        ]
        rows += [[f"failed: {trial.reason}", "-", str(trial.number), "1"] for trial in failed[:_SHOWN]]
        console().print(table("Why trials went wrong", ["finding", "severity", "trials", "count"], rows, left=3))
    if found.importance:
        rows = [[name, f"{share:.0%}"] for name, share in found.importance.items()]
        console().print(table("What mattered (PED-ANOVA)", ["value", "share"], rows))
    counted = "" if best.status == "finished" else f" ({best.status}: it counts as its {metric} at initialisation)"
    say(f"best: trial {best.number}, {metric} {number(best.value, 5)}{counted}")
    if best.arm:
        say(f"arm: {best.arm}")
    else:
        say("values: " + ", ".join(f"{name}={_value(value)}" for name, value in best.values.items()))


def _plot(found: Tuning) -> None:
    """Draw the best value so far over the trials."""
    best: list[float] = []
    for trial in found.trials:
        if trial.ranked and trial.value is not None:
            last = best[-1] if best else trial.value
            best.append(max(last, trial.value) if found.plan["maximize"] else min(last, trial.value))
    if len(best) < 2:
        return
    places = sorted({round(at * (len(best) - 1) / (_SHOWN - 1)) for at in range(_SHOWN)})
    label = f"best {found.plan['metric']} so far, over the trials with a value"
    for line in curves([place + 1 for place in places], {label: [best[place] for place in places]}, height=8):
        say(line)
    say()


def _why(trial: TrialResult) -> str:
    return ", ".join(entry["name"] for entry in trial.findings[:2]) + (", ..." if len(trial.findings) > 2 else "")


def _numbers(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:_SHOWN]))
    return f"{shown}, ..." if len(numbers) > _SHOWN else shown


def _value(value: Any) -> str:
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
