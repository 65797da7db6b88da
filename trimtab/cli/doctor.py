"""`trimtab doctor`: what went wrong in a run, and why."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trimtab.cli.show import print_json, say, use_threads


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("doctor")(doctor)


def doctor(
    run: Annotated[Path, typer.Argument(help="The run's folder.")],
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Examine a recorded run. Exit code 0: healthy, 1: findings, 2: no readable run."""
    use_threads()
    from trimtab.compare.store import strict
    from trimtab.diagnose.doctor import Doctor

    diagnosis = Doctor().examine(run)
    if json:
        print_json(strict(diagnosis.to_json()))
    else:
        for line in str(diagnosis).splitlines():
            say(line)
    # A note of severity "info" is worth reading, but no fault.
    if any(finding.severity != "info" for finding in diagnosis.findings):
        raise typer.Exit(1)
