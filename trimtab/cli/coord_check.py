"""`trimtab coord-check`: do a few steps of training move every layer alike at every width, as muP promises?"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trimtab.cli.plot import curves
from trimtab.cli.show import Meter, console, number, print_json, resumable, say, table, use_threads
from trimtab.errors import UsageError

if TYPE_CHECKING:
    from trimtab.tune import CoordinateCheck


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("coord-check")(coord_check)


def coord_check(
    name: Annotated[str, typer.Argument(metavar="WORKLOAD", help="A workload, as trimtab workloads lists them.")],
    widths: Annotated[str, typer.Option(help="Three or more, joined by commas.")] = "64,128,256,512",
    steps: Annotated[int, typer.Option(help="Optimizer steps of every model.")] = 5,
    seeds: Annotated[int, typer.Option(help="Models of each width; one alone may mislead.")] = 3,
    standard: Annotated[bool, typer.Option("--standard", help="Without muP.")] = False,
    both: Annotated[bool, typer.Option("--both", help="With muP and without.")] = False,
    lr: Annotated[float | None, typer.Option(help="Learning rate at the workload's own width; its own.")] = None,
    optimizer: Annotated[str, typer.Option(help="adam or sgd.")] = "adam",
    batch_size: Annotated[int, typer.Option(help="Samples of a step.")] = 16,
    tolerance: Annotated[float, typer.Option(help="Largest slope in log-log that counts as flat.")] = 0.3,
    workers: Annotated[int, typer.Option(help="Worker processes, one thread each.")] = 2,
    text: Annotated[Path | None, typer.Option(help="A file or folder of text, for language models.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of results; runs/coord-check-WORKLOAD.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Train a workload at several widths for a few steps, with muP. Exit code 1 if a layer then grows or vanishes."""
    use_threads()
    from trimtab.compare.store import read_json
    from trimtab.report.coord_check import build_coord_check_report
    from trimtab.tune.scaling.workload_coordinates import RESULTS, workload_coordinate_check

    if standard and both:
        raise UsageError("--standard and --both exclude each other: --both is with muP and without.")
    folder = out or Path("runs") / f"coord-check-{name}"
    with resumable(folder), Meter(f"coordinate check of {name}") as meter:
        checks = workload_coordinate_check(
            name,
            widths=_widths(widths),
            folder=folder,
            parametrizations=("mup", "standard") if both else ("standard",) if standard else ("mup",),
            lr=lr,
            optimizer=optimizer,
            steps=steps,
            seeds=seeds,
            batch_size=batch_size,
            tolerance=tolerance,
            workers=workers,
            text=text,
            progress=meter.jobs,
        )
    result = read_json(folder / RESULTS) or {}
    build_coord_check_report(result, folder / "coord-check.html")
    if json:
        print_json(result)
    else:
        _print(name, checks)
        say(f"written: {folder / RESULTS}, {folder / 'coord-check.html'}")
    if "mup" in checks and not checks["mup"].flat:
        raise typer.Exit(1)


def _widths(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch(r"[0-9]{1,6}", part) for part in parts):
        raise UsageError(f"--widths {text!r} should be whole numbers joined by commas, such as 64,128,256,512.")
    return [int(part) for part in parts]


def _print(name: str, checks: Mapping[str, CoordinateCheck]) -> None:
    """Print a table for each parametrisation, a plot of how changes grow with the width, and the verdicts."""
    lines: dict[str, list[float]] = {}
    for check in checks.values():
        low, high = check.widths[0], check.widths[-1]
        rows = []
        for entry in check.modules:
            sizes = [number(check.mean("sizes", entry, width), 3) for width in (low, high)]
            changes = [number(check.mean("changes", entry, width), 3) for width in (low, high)]
            slopes = [number(slope, 2) for slope in (entry.size_slope, entry.change_slope)]
            rows.append([entry.module or "(the model)", *sizes, slopes[0], *changes, slopes[1], entry.verdict])
        heads = [
            "module",
            f"size at {low}",
            f"at {high}",
            "slope",
            f"change at {low}",
            f"at {high}",
            "slope",
            "verdict",
        ]
        title = f"{name}, {check.parametrization}: mean |activation| after {check.steps} steps, and its change"
        console().print(table(title, heads, rows))
        relative = [_growth(check, width) for width in check.widths]
        if all(map(math.isfinite, relative)):
            lines[check.parametrization] = relative
    if lines:
        say("change of activations relative to the smallest width, geometric mean over modules")
        for line in curves(next(iter(checks.values())).widths, lines):
            say(line)
        say()
    for check in checks.values():
        said = ", ".join(f"{count} {verdict}" for verdict, count in check.verdicts.items())
        worst = [entry.module for entry in check.modules if entry.verdict not in ("flat", "still")]
        say(
            f"{check.parametrization}: {said}"
            + (f" ({', '.join(worst[:5])}{', ...' * (len(worst) > 5)})" if worst else "")
        )


def _growth(check: CoordinateCheck, width: int) -> float:
    pairs = [[check.mean("changes", entry, at) for at in (check.widths[0], width)] for entry in check.modules]
    logs = [math.log(wide / narrow) for narrow, wide in pairs if narrow > 0 and wide > 0]
    lost = any(math.isnan(value) for pair in pairs for value in pair)
    return math.nan if lost or not logs else math.exp(statistics.fmean(logs))
