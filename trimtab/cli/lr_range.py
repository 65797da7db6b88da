"""`trimtab lr-range`: raise the learning rate until the loss blows up, and read off a rate."""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trimtab.cli.plot import curves
from trimtab.cli.show import Interrupted, Meter, console, number, print_json, say, table, use_threads

if TYPE_CHECKING:
    from trimtab.tune import LRRange

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
    text: Annotated[Path | None, typer.Option(help="A file or folder of text, for language models.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for lr-range.json and lr-range.html.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Raise the learning rate step by step until the loss blows up, suggest one. Exit code 1 if none can be."""
    use_threads()
    from trimtab.tune import workload_lr_range
    from trimtab.workloads import parse_arm, workload

    job = workload(name)
    settings = parse_arm(arm, job.defaults) if arm else job.defaults
    try:
        with Meter(f"range test on {name}", steps) as meter:
            found = workload_lr_range(
                job,
                settings,
                lowest=lowest,
                highest=highest,
                steps=steps,
                mode=mode,
                text=text,
                progress=lambda done, total, loss: meter.update(done, total, f"loss {loss:.4f}"),
            )
    except KeyboardInterrupt:
        raise Interrupted("interrupted: nothing is kept of a range test, run it again.") from None
    result = {"kind": "lr-range", "workload": name, "arm": arm, **found.to_json()}
    if out is not None:
        from trimtab.record.files import write_whole
        from trimtab.report.lr_range import build_lr_range_report

        write_whole(out / "lr-range.json", json_module.dumps(result, indent=2, allow_nan=False) + "\n")
        build_lr_range_report(result, out / "lr-range.html")
    if json:
        print_json(result)
    else:
        _print(name, found)
        if out is not None:
            say(f"written: {out / 'lr-range.json'}, {out / 'lr-range.html'}")
    if found.suggestion is None:
        raise typer.Exit(1)


def _print(name: str, found: LRRange) -> None:
    """Print some of the losses, their plot, and what is read from them."""
    if found.lrs:
        last = len(found.lrs) - 1
        places = sorted({round(row * last / (_ROWS - 1)) for row in range(_ROWS)})
        rows = [[f"{found.lrs[i]:.3g}", number(found.losses[i]), number(found.smoothed[i])] for i in places]
        title = f"{name}: loss while the learning rate rises, {len(found.lrs)} steps ({found.stopped_because})"
        console().print(table(title, ["learning rate", "loss", "smoothed"], rows, left=0))
        top = 1.5 * abs(found.losses[0])
        for line in curves([found.lrs[i] for i in places], {"loss": [min(found.losses[i], top) for i in places]}):
            say(line)
        say()
    if found.suggestion is not None and found.largest_stable is not None:
        say(f"suggestion: {found.suggestion:.3g} (steepest descent)")
        say(f"largest stable: {found.largest_stable:.3g} (lowest loss; a tenth of it is the cautious choice)")
        if found.reason:
            say(found.reason)
    else:
        say(f"no suggestion: {found.reason}")
