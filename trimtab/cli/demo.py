"""`trimtab demo`: the whole way once, from a run that goes wrong to a remedy that is shown to help."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trimtab.catalogue import method
from trimtab.cli.compare import first_runs, print_comparison
from trimtab.cli.show import Meter, number, resumable, say, use_threads
from trimtab.errors import RunFailedError, UsageError

if TYPE_CHECKING:
    from trimtab.compare import Arm, Comparison
    from trimtab.diagnose.finding import Finding

_WORKLOAD = "lm-small"
_FINDING = "attention-logit-growth"
_REMEDIES = 3
_MARKER = "demo.json"


@dataclass(frozen=True)
class _Size:
    """How much the demo runs: a learning rate that goes wrong, steps and samples of a run, seeds.

    The damage grows with the number of steps, not of samples: small batches show it within the demo's two minutes.
    """

    lr: float
    steps: int
    batch_size: int
    seeds: int

    def arm(self, *remedies: str) -> Arm:
        """Return the arm with these remedies."""
        from trimtab.compare import Arm
        from trimtab.workloads import workload

        defaults = workload(_WORKLOAD).defaults
        settings = defaults.replace(lr=self.lr, steps=self.steps, batch_size=self.batch_size, remedies=remedies)
        return Arm(" + ".join([f"lr {self.lr:g}", *remedies]), settings)


_FULL = _Size(lr=0.1, steps=500, batch_size=8, seeds=4)
_QUICK = _Size(lr=0.1, steps=200, batch_size=8, seeds=2)


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("demo")(demo)


def demo(
    out: Annotated[Path, typer.Option(help="Folder of the demo; the same one goes on where it was.")] = Path(
        "trimtab-demo"
    ),
    quick: Annotated[bool, typer.Option("--quick", help="Shorter runs, fewer seeds.")] = False,
    workers: Annotated[int, typer.Option(help="Worker processes, one thread each.")] = 2,
) -> None:
    """A run goes wrong, the doctor says why, remedies are tried: about two minutes."""
    began = time.monotonic()
    use_threads()
    size = _QUICK if quick else _FULL
    _claim(out)
    with resumable(out):
        say(
            f"1. Train {_WORKLOAD}, a causal transformer on the Python standard library's sources, at learning rate "
            f"{size.lr:g} with the watch on.",
            style="bold",
        )
        run = _watched_run(out, size)
        say(f"   recorded in {run}")
        say()
        say(f"2. The doctor examines it (trimtab doctor {run}).", style="bold")
        finding = _diagnosis(run)
        say()
        names = [name for name in finding.remedies if method(name).acts_on != "optimizer"][:_REMEDIES]
        say(f"3. Try its remedies, {', '.join(names)}: the same {size.seeds} seeds, the same batches.", style="bold")
        arms = [size.arm(), *(size.arm(name) for name in names)]
        comparison = _comparison(out, arms, size, workers)
    say()
    say("4. Before and after.", style="bold")
    print_comparison(comparison)
    say()
    report = _report(out, comparison)
    say(f"5. The report, one file that opens from disk: {report}", style="bold")
    say(f"   {time.monotonic() - began:.0f} s in all. Next: trimtab sweep {_WORKLOAD} --with {names[0]}")


def _claim(folder: Path) -> None:
    """Take a new or empty folder, or one of an earlier demo; leave anything else alone."""
    from trimtab.compare.store import read_json, write_json

    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file: choose another folder with --out.")
    marker = folder / _MARKER
    if folder.is_dir() and any(folder.iterdir()) and (read_json(marker) or {}).get("kind") != "demo":
        raise UsageError(f"{folder} holds something that is not a demo of trimtab: choose another folder with --out.")
    write_json(marker, {"kind": "demo"})


def _watched_run(folder: Path, size: _Size) -> Path:
    """Train the first arm on its first seed; the comparison finds it finished and does not repeat it."""
    from trimtab.compare.training import prepared, run_all, training_job

    job = training_job(prepared(_WORKLOAD), size.arm().settings.replace(seed=0))
    with Meter("   training", size.steps) as meter:
        [outcome] = run_all([job], folder, workers=1, progress=meter.jobs)
    ending = "diverged" if outcome.diverged else f"final loss {number(outcome.loss)}"
    say(f"   {ending} ({number(outcome.initial_loss)} at initialisation) after {outcome.steps} steps")
    return Path(str(outcome.folder))


def _diagnosis(run: Path) -> Finding:
    """Print what the doctor says and return the finding that the demo is about."""
    from trimtab.diagnose.doctor import Doctor

    diagnosis = Doctor().examine(run)
    for line in str(diagnosis).splitlines():
        say(f"   {line}".rstrip())
    found = [finding for finding in diagnosis.findings if finding.name == _FINDING and finding.remedies]
    if not found:
        raise RunFailedError(f"the doctor did not name {_FINDING} in {run}, which this run is made to show.")
    return found[0]


def _comparison(folder: Path, arms: list[Arm], size: _Size, workers: int) -> Comparison:
    from trimtab.compare import compare

    with Meter("   comparing") as meter:
        return compare(
            _WORKLOAD,
            arms,
            folder=folder,
            seeds=size.seeds,
            workers=workers,
            progress=meter.jobs,
        )


def _report(folder: Path, comparison: Comparison) -> Path:
    from trimtab.report import build_report

    path = folder.resolve() / "report.html"
    build_report(first_runs(comparison), path, comparison=comparison.to_json(), title=f"trimtab demo: {_FINDING}")
    return path
