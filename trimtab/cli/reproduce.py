"""`trimtab reproduce`: run the claims of a method's card again."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trimtab.cli.compare import print_comparison, print_study
from trimtab.cli.show import Meter, print_json, resumable, say, use_threads

if TYPE_CHECKING:
    from trimtab.compare import Reproduction


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("reproduce")(reproduce)


def reproduce(
    name: Annotated[str, typer.Argument(help="A method, as trimtab methods lists them.")],
    seeds: Annotated[int | None, typer.Option(help="Pairs, instead of the card's number.")] = None,
    workers: Annotated[int, typer.Option(help="Worker processes, one thread each.")] = 2,
    out: Annotated[Path | None, typer.Option(help="Folder of runs and results; runs/reproduce-NAME.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Run the experiments of a method's card again."""
    use_threads()
    from trimtab import catalogue
    from trimtab.compare import Comparison
    from trimtab.compare import reproduce as run

    card = catalogue.method(name)
    folder = out or Path("runs") / f"reproduce-{name}"
    with resumable(folder), Meter(f"reproducing {name}") as meter:
        found = run(card, folder=folder, seeds=seeds, workers=workers, progress=meter.jobs)
    if json:
        print_json([entry.to_json() for entry in found])
        return
    say(f"{card.name}: {card.paper}", style="bold")
    say(f"the paper's claim: {card.claim}")
    for entry in found:
        say()
        if isinstance(entry.comparison, Comparison):
            print_comparison(entry.comparison)
        else:
            print_study(entry.comparison)
        for line in _lines(entry):
            say(line)
    say()
    say(f"runs and reproduction.json: {folder}")


def _lines(entry: Reproduction) -> list[str]:
    experiment, verdict = entry.experiment, entry.verdict
    lines = [f"ours: {experiment.metric}, {experiment.treated!r} against {experiment.baseline!r}: {verdict}"]
    if entry.mechanism is not None:
        low, high = entry.mechanism.low, entry.mechanism.high
        lines.append(
            f"mechanism: {experiment.mechanism} changed by {entry.mechanism.mean:+.3g} "
            f"({entry.mechanism.level:.0%} interval {low:+.3g} to {high:+.3g}, n={entry.mechanism.n})"
        )
    elif experiment.mechanism:
        lines.append(f"mechanism: {experiment.mechanism} is not recorded in both arms")
    if experiment.outcome:
        lines.append(f"on the card: {experiment.outcome}")
    return lines
