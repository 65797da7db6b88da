"""`trimtab sweep`: loss against learning rate, with and without remedies, at one or several sizes: S and S+."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trimtab.cli.compare import verdict
from trimtab.cli.plot import curves
from trimtab.cli.show import Meter, console, number, print_json, resumable, say, table, use_threads
from trimtab.errors import UsageError

if TYPE_CHECKING:
    from trimtab.compare import Curve, Sweep


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
    width: Annotated[
        str, typer.Option(help="Widths of the model, such as 32,64,128; a curve of each arm at each.")
    ] = "",
    depth: Annotated[str, typer.Option(help="Depths of the model, such as 2,4; with every width.")] = "",
    seeds: Annotated[int, typer.Option(help="Runs at each point.")] = 1,
    steps: Annotated[int | None, typer.Option(help="Steps of every run.")] = None,
    workers: Annotated[int, typer.Option(help="Worker processes, one thread each.")] = 2,
    text: Annotated[Path | None, typer.Option(help="A file or folder of text, for language models.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of runs and results; runs/sweep-WORKLOAD.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    report: Annotated[Path | None, typer.Option(help="Also write an HTML report.")] = None,
) -> None:
    """Sweep the learning rate of optimizers, without and with remedies, over sizes: curves, S and S+."""
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
            widths=whole_numbers(width, "width"),
            depths=whole_numbers(depth, "depth"),
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


def whole_numbers(text: str, name: str) -> list[int]:
    """Read a list such as "32,64,128".

    Raises:
        UsageError: if a part is not a whole number.
    """
    try:
        return [int(part) for part in text.split(",")] if text.strip() else []
    except ValueError:
        raise UsageError(f"{name}s are whole numbers joined by commas, such as 32,64, got {text!r}.") from None


def print_sweep(result: Sweep) -> None:
    """Print the table of losses and the plot of each size, S and S+, and S against width."""
    for size in result.sizes:
        _print_curves(result, result.at(size), size.label)
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
    if len(result.widths) > 1:
        _print_growth(result)


def _print_curves(result: Sweep, shown: list[Curve], size: str) -> None:
    count = len(result.seeds)
    rows = []
    for place, lr in enumerate(result.lrs):
        row = [f"{lr:g}"]
        for curve in shown:
            lost = sum(outcome.diverged for outcome in curve.outcomes[place])
            row.append(number(curve.mean_losses[place]) + (f" ({lost} diverged)" if lost else ""))
        rows.append(row)
    where = f"{result.workload}, {size}" if size else result.workload
    title = f"{where}: final loss, mean of {count} seed{'s' * (count > 1)}"
    console().print(table(title, ["learning rate", *(curve.side for curve in shown)], rows, left=0))
    for line in curves(result.lrs, {curve.side: curve.mean_losses for curve in shown}):
        say(line)
    say()


def _print_growth(result: Sweep) -> None:
    """Plot S against width, a plot for each depth."""
    for depth in result.depths or (0,):
        lines: dict[str, list[float]] = {}
        for curve in result.curves:
            if curve.size.depth == depth:
                lines.setdefault(curve.side, []).append(curve.s)
        say()
        say("S against width" + (f", depth {depth}" if depth else ""))
        for line in curves(result.widths, lines):
            say(line)
