"""`trimtab pbt`: population based training on a workload."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trimtab.cli.plot import curves
from trimtab.cli.show import Meter, console, number, print_json, resumable, say, table, use_threads

if TYPE_CHECKING:
    from trimtab.tune.population.population_based import Population

_COLUMNS = 10


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("pbt")(pbt)


def pbt(
    name: Annotated[str, typer.Argument(metavar="WORKLOAD", help="A workload, as trimtab workloads lists them.")],
    space: Annotated[
        list[str] | None,
        typer.Option("--space", help="NAME=LOW:HIGH with :log or :int behind it; may be repeated. lr=1e-4:1e-1:log"),
    ] = None,
    members: Annotated[int, typer.Option(help="Runs in the population.")] = 10,
    interval: Annotated[int, typer.Option(help="Steps between two decisions of a member.")] = 25,
    steps: Annotated[int | None, typer.Option(help="Steps of every member.")] = None,
    exploit: Annotated[str, typer.Option(help="Whom to copy: truncation, tournament or t-test.")] = "truncation",
    share: Annotated[float, typer.Option(help="Of truncation: this share copies one of the best such share.")] = 0.2,
    resample: Annotated[float, typer.Option(help="Probability of a new draw in place of 0.8 or 1.2 times.")] = 0.0,
    metric: Annotated[str, typer.Option(help="loss or accuracy.")] = "loss",
    synchronous: Annotated[bool, typer.Option("--synchronous", help="Members wait for each other.")] = False,
    arm: Annotated[str, typer.Option(help="Such as 'lion,clip=1'; the workload's defaults, constant rate.")] = "",
    workers: Annotated[int, typer.Option(help="Worker processes here, one thread each.")] = 2,
    text: Annotated[Path | None, typer.Option(help="A file or folder of text, for language models.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder that all workers share; runs/pbt-WORKLOAD.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Train a population: the worst members copy the best and change their hyper-parameters.

    The same command started elsewhere with the same --out joins in; started again after a kill it goes on.
    """
    use_threads()
    from trimtab.report.population import build_population_report
    from trimtab.tune.population.population_based import train_population
    from trimtab.workloads import parse_arm, workload

    job = workload(name)
    plain = job.defaults.replace(schedule="constant", warmup=0.0)
    settings = parse_arm(arm, plain) if arm else plain
    if steps is not None:
        settings = settings.replace(steps=steps)
    folder = out or Path("runs") / f"pbt-{name}"
    with resumable(folder), Meter(f"population on {name}") as meter:
        found = train_population(
            job,
            space or ["lr=1e-4:1e-1:log"],
            folder=folder,
            settings=settings,
            members=members,
            interval=interval,
            exploit=exploit,
            share=share,
            resample=resample,
            metric=metric,
            synchronous=synchronous,
            workers=workers,
            text=text,
            progress=meter.jobs,
        )
    build_population_report(found.to_json(), folder / "population.html")
    if json:
        print_json(found.to_json())
    else:
        _print(found)
        say(f"written: {folder / 'population.json'}, {folder / 'population.html'}")
    if found.records[found.best][-1]["diverged"]:
        raise typer.Exit(1)


def _print(found: Population) -> None:
    """Print the members, and the best one's hyper-parameters over its steps."""
    names = list(found.plan["space"])
    metric = found.plan["metric"]
    rows = []
    for place, member in enumerate(found.ranking, 1):
        known = found.records[member]
        last = known[-1]
        ancestors = sorted({record["member"] for record in found.lineage(member)} - {member})
        rows.append(
            [
                str(member),
                "diverged" if last["diverged"] else number(last["score"]),
                str(place),
                *(number(last["hyperparameters"][name]) for name in names),
                str(sum(record["action"] == "exploit" for record in known)),
                ", ".join(map(str, ancestors)) or "-",
            ]
        )
    steps = sum(known[-1]["step"] for known in found.records)
    title = f"{found.workload}: {len(rows)} members, {steps} steps in all"
    heads = ["member", f"last {metric}", "rank", *(f"last {name}" for name in names), "copied", "weights from"]
    console().print(table(title, heads, rows, left=0))
    schedule = found.schedule(found.best)
    rows = [
        [
            f"{row['first']} to {row['last']}",
            str(row["member"]),
            *(number(row["hyperparameters"][name]) for name in names),
            number(row["score"]),
        ]
        for row in schedule
    ]
    heads = ["steps", "member", *names, metric]
    console().print(table(f"What member {found.best}, the best, was trained with", heads, rows))
    for name in names:
        log = bool(found.plan["space"][name]["log"])
        values = [float(row["hyperparameters"][name]) for row in schedule]
        places = sorted({round(at * (len(values) - 1) / (_COLUMNS - 1)) for at in range(_COLUMNS)})
        drawn = [math.log10(values[at]) if log else values[at] for at in places]
        label = f"{'log10 ' * log}{name} from each step on"
        for line in curves([float(schedule[at]["first"]) for at in places], {label: drawn}, height=8):
            say(line)
