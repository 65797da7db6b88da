"""`trimtab lr-range`: raise the learning rate until the loss blows up, and read off a rate."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trimtab.cli.plot import curves
from trimtab.cli.show import Meter, console, number, print_json, resumable, say, table, use_threads

if TYPE_CHECKING:
    from trimtab.tune.lr.workload_range import LRRanges

_ROWS = 11


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("lr-range")(lr_range)


def lr_range(
    name: Annotated[str, typer.Argument(metavar="WORKLOAD", help="A workload, as trimtab workloads lists them.")],
    lowest: Annotated[float, typer.Option(help="First learning rate.")] = 1e-7,
    highest: Annotated[float, typer.Option(help="Last learning rate.")] = 10.0,
    steps: Annotated[int, typer.Option(help="Optimizer steps, at least 10.")] = 100,
    mode: Annotated[str, typer.Option(help="exponential or linear.")] = "exponential",
    arm: Annotated[str, typer.Option(help="Such as 'lion,weight_decay=0.1'; the workload's defaults.")] = "",
    seeds: Annotated[int, typer.Option(help="Tests, each on a seed of its own; the suggestion is their median.")] = 1,
    workers: Annotated[int, typer.Option(help="Worker processes, one thread each.")] = 2,
    text: Annotated[Path | None, typer.Option(help="A file or folder of text, for language models.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of results; runs/lr-range-WORKLOAD.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Raise the learning rate step by step until the loss blows up, suggest one. Exit code 1 if none can be."""
    use_threads()
    from trimtab.compare.store import write_results
    from trimtab.report.lr_range import build_lr_range_report
    from trimtab.tune.lr.workload_range import workload_lr_ranges
    from trimtab.workloads import parse_arm, workload

    job = workload(name)
    settings = parse_arm(arm, job.defaults) if arm else job.defaults
    folder = out or Path("runs") / f"lr-range-{name}"
    with resumable(folder), Meter(f"range test on {name}") as meter:
        found = workload_lr_ranges(
            job,
            settings,
            folder=folder,
            seeds=seeds,
            lowest=lowest,
            highest=highest,
            steps=steps,
            mode=mode,
            workers=workers,
            text=text,
            progress=meter.jobs,
        )
    result = {"kind": "lr-range", "workload": name, "arm": arm, **found.to_json()}
    write_results(folder / "lr-range.json", "lr-range", result)
    build_lr_range_report(result, folder / "lr-range.html")
    if json:
        print_json(result)
    else:
        _print(name, found)
        say(f"written: {folder / 'lr-range.json'}, {folder / 'lr-range.html'}")
    if found.suggestion is None:
        raise typer.Exit(1)


def _print(name: str, ranges: LRRanges) -> None:
    """Print some of the losses of one seed, their plot, and what is read from all."""
    found, many = ranges.tests[ranges.shown], len(ranges.tests) > 1
    if found.lrs:
        last = len(found.lrs) - 1
        places = sorted({round(row * last / (_ROWS - 1)) for row in range(_ROWS)})
        rows = [[f"{found.lrs[i]:.3g}", number(found.losses[i]), number(found.smoothed[i])] for i in places]
        which = f", seed {ranges.seeds[ranges.shown]} of {len(ranges.seeds)} seeds" if many else ""
        title = f"{name}: loss while the learning rate rises, {len(found.lrs)} steps ({found.stopped_because}){which}"
        console().print(table(title, ["learning rate", "loss", "smoothed"], rows, left=0))
        top = 1.5 * abs(found.losses[0])
        for line in curves([found.lrs[i] for i in places], {"loss": [min(found.losses[i], top) for i in places]}):
            say(line)
        say()
    if many:
        rows = [
            [str(seed), number(test.suggestion, 3), number(test.largest_stable, 3), test.stopped_because]
            for seed, test in zip(ranges.seeds, ranges.tests, strict=True)
        ]
        console().print(table("Each seed", ["seed", "suggestion", "largest stable", "stopped because"], rows))
    if ranges.suggestion is not None and ranges.largest_stable is not None:
        say(f"suggestion: {ranges.suggestion:.3g} (steepest descent{_spread(ranges, 'suggestion')})")
        cautious = "lowest loss; a tenth of it is the cautious choice"
        say(f"largest stable: {ranges.largest_stable:.3g} ({cautious}{_spread(ranges, 'largest_stable')})")
        if ranges.reason:
            say(ranges.reason)
    else:
        say(f"no suggestion: {ranges.reason}")


def _spread(ranges: LRRanges, name: str) -> str:
    bounds = ranges.bounds(name)
    if bounds is None or len(ranges.tests) == 1:
        return ""
    return f"; median of {len(ranges.tests)} seeds, {bounds[0]:.3g} to {bounds[1]:.3g}"
