"""`trimtab methods`, `trimtab method`, `trimtab workloads`: what there is."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Annotated

import typer

from trimtab.cli.show import console, print_json, say, table

if TYPE_CHECKING:
    from trimtab.card import Card

_WIDTH = 100


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("methods")(methods)
    app.command("method")(method)
    app.command("workloads")(workloads)


def methods(
    room: Annotated[str | None, typer.Option(help="Only one room, such as layers.")] = None,
    treats: Annotated[
        str | None, typer.Option(help="Only what treats a finding, such as loss-spike, first remedy first.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the methods of the catalogue."""
    from trimtab import catalogue

    cards = catalogue.methods(room=room, treats=treats)
    if json:
        print_json([card.to_json() for card in cards])
        return
    if not cards:
        say("no such method yet")
        return
    rows = [[card.name, card.room, card.acts_on, card.summary, ", ".join(card.treats)] for card in cards]
    console().print(table(f"{len(cards)} methods", ["name", "room", "acts on", "what it does", "treats"], rows, left=5))
    say("trimtab method NAME shows the card: paper, claim, equation, defaults, what verifies it.")


def method(
    name: Annotated[str, typer.Argument(help="The method's name.")],
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what a method says of itself: its card."""
    from trimtab import catalogue

    card = catalogue.method(name)
    if json:
        print_json(card.to_json())
        return
    say(card.name, style="bold")
    for line in _lines(card):
        say(line)


def _lines(card: Card) -> list[str]:
    from trimtab.workloads.optimizers import arm_name, option_names, runnable

    lines = [
        card.summary,
        "",
        f"room        {card.room} ({card.entry.replace(':', '.')})",
        f"acts on     {card.acts_on}",
        f"treats      {', '.join(f'{name} (remedy {place})' for name, place in card.treats.items()) or 'no finding'}",
        f"paper       {card.paper.title} ({card.paper.year})",
        f"            {card.paper.url}",
    ]
    if runnable(card):
        name = arm_name(card)
        lines.insert(4, f"in an arm   {name}, with the options {', '.join(option_names(name))}")
    if card.paper.code and card.paper.code != card.paper.url:
        lines.append(f"code        {card.paper.code}")
    lines += ["", "Claim", *_indented(card.claim), "", "Equation", *_indented(card.equation)]
    lines += ["", "Defaults"]
    lines += [f"  {default.name} = {default.value}    from {default.source}" for default in card.defaults] or ["  none"]
    lines += ["", "Verified by"]
    lines += [f"  {level:<10}{test}" for level, tests in card.verified.items() for test in tests] or ["  nothing yet"]
    lines += ["", "Deviations from the paper"]
    lines += [part for deviation in card.deviations for part in _indented(deviation)] or ["  none"]
    lines += ["", f"Experiments (trimtab reproduce {card.name} runs them again)"]
    for experiment in card.experiments:
        lines.append(f"  {experiment.workload}: {experiment.treated!r} against {experiment.baseline!r}")
        lines.append(f"    {experiment.metric}, {experiment.seeds} seeds: {experiment.outcome or 'not run yet'}")
    return lines if card.experiments else [*lines, "  none"]


def _indented(text: str) -> list[str]:
    return [
        part
        for line in text.splitlines()
        for part in textwrap.wrap(line, _WIDTH, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)
    ]


def workloads(json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """List the workloads: small real training jobs."""
    from trimtab.workloads import workloads as known

    found = known()
    if json:
        print_json(
            [
                {"name": entry.name, "summary": entry.summary, "defaults": entry.defaults.model_dump(mode="json")}
                for entry in found
            ]
        )
        return
    rows = [
        [
            entry.name,
            entry.summary,
            f"{entry.defaults.optimizer}, lr {entry.defaults.lr:g}",
            f"{entry.defaults.steps}",
            "all" if entry.defaults.batch_size == 0 else f"{entry.defaults.batch_size}",
        ]
        for entry in found
    ]
    console().print(table("Workloads", ["name", "what it is", "default", "steps", "batch"], rows, left=3))
