"""`trimtab sweep`: loss against learning rate, with and without remedies, and its sensitivity."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trimtab.cli.compare import verdict
from trimtab.cli.plot import curves
from trimtab.cli.show import Meter, console, number, print_json, resumable, say, table, use_threads

if TYPE_CHECKING:
    from trimtab.compare import Sweep


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("sweep")(sweep)


def sweep(
    workload: Annotated[str, typer.Argument(help="A workload, as trimtab workloads lists them.")],
    lr: Annotated[str, typer.Option(help="Range LOW:HIGH, evenly spaced in log.")] = "3e-4:3e-1",
    points: Annotated[int, typer.Option(help="Learning rates in the range.")] = 7,
    remedies: Annotated[
        list[str] | None,
        typer.Option("--with", help="A method, or several joined by commas, for one more curve; may be repeated."),
    ] = None,
    arms: Annotated[
        list[str] | None,
        typer.Option("--arm", help="Such as 'lion,weight_decay=0.1', for one curve; the first is the baseline."),
    ] = None,
    seeds: Annotated[int, typer.Option(help="Runs at each point.")] = 1,
    steps: Annotated[int | None, typer.Option(help="Steps of every run.")] = None,
    workers: Annotated[int, typer.Option(help="Worker processes, one thread each.")] = 2,
    text: Annotated[Path | None, typer.Option(help="A file or folder of text, for language models.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of runs and results; runs/sweep-WORKLOAD.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    report: Annotated[Path | None, typer.Option(help="Also write an HTML report.")] = None,
) -> None:
    """Sweep the learning rate of optimizers, without and with remedies: curves, S and S+."""
    use_threads()
    from trimtab.compare import log_grid
    from trimtab.compare import sweep as run

    grid = log_grid(lr, points)
    folder = out or Path("runs") / f"sweep-{workload}"
    with resumable(folder), Meter(f"sweeping {workload}") as meter:
        result = run(
            workload,
            grid,
            folder=folder,
            remedies=[[name.strip() for name in names.split(",")] for names in remedies or ()],
            arms=arms or (),
            seeds=seeds,
            steps=steps,
            workers=workers,
            text=text,
            progress=meter.jobs,
        )
    if report is not None:
        from trimtab.report import build_report

        runs = [Path(row[0].folder) for curve in result.curves for row in curve.outcomes if row[0].folder]
        build_report(runs, report, sweep=result.to_json())
    if json:
        print_json(result.to_json())
        return
    print_sweep(result)
    say(f"runs and sweep.json: {folder}")
    if report is not None:
        say(f"report: {report}")


def print_sweep(result: Sweep) -> None:
    """Print the table of losses, the plot, and S and S+."""
    count = len(result.seeds)
    rows = []
    for place, lr in enumerate(result.lrs):
        row = [f"{lr:g}"]
        for curve in result.curves:
            lost = sum(outcome.diverged for outcome in curve.outcomes[place])
            row.append(number(curve.mean_losses[place]) + (f" ({lost} diverged)" if lost else ""))
        rows.append(row)
    title = f"{result.workload}: final loss, mean of {count} seed{'s' * (count > 1)}"
    labels = [curve.arm.label for curve in result.curves]
    console().print(table(title, ["learning rate", *labels], rows, left=0))
    for line in curves(result.lrs, {curve.arm.label: curve.mean_losses for curve in result.curves}):
        say(line)
    say()
    summary = []
    for curve in result.curves:
        lr, loss = curve.best
        pairs = result.pairs.get(curve.arm.label)
        _, words = verdict(pairs["S"] if pairs else None)
        _, plus = verdict(pairs["S_plus"] if pairs else None)
        summary.append([curve.arm.label, number(curve.s), words, number(curve.s_plus), plus, f"{lr:g}", number(loss)])
    title = f"Learning-rate sensitivity over {result.lrs[0]:g} to {result.lrs[-1]:g} (lower is steadier)"
    heads = ["curve", "S", "verdict on S", "S+", "verdict on S+", "best lr", "its loss"]
    console().print(table(title, heads, summary))
