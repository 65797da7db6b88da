"""`trimtab bench`: an arm against baselines that were tuned as hard as it was, over a suite of small jobs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trimtab.cli.compare import verdict
from trimtab.cli.plot import curves
from trimtab.cli.show import Meter, console, number, print_json, resumable, say, table, use_threads

if TYPE_CHECKING:
    from trimtab.bench import Benchmark, Judgement, Measured

_TAUS = (1.0, 1.1, 1.2, 1.4, 1.7, 2.0, 2.5, 3.0, 4.0)
_MECHANISM = "attention_max_logit"


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("bench")(bench)


def bench(
    arm: Annotated[
        str | None, typer.Argument(help="An optimizer, with options: 'lion' or 'galore,rank=8'; without a lr.")
    ] = None,
    remedies: Annotated[list[str] | None, typer.Option("--with", help="A method to add; may be repeated.")] = None,
    lr: Annotated[
        str | None, typer.Option(help="Range LOW:HIGH to tune in; the optimizer's own three decades.")
    ] = None,
    tune_baselines: Annotated[
        bool, typer.Option("--tune-baselines", help="Tune AdamW and SGD first where that is not done.")
    ] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="Try the machinery out: not the protocol, no verdicts.")
    ] = False,
    task: Annotated[list[str] | None, typer.Option("--task", help="Only this task; may be repeated.")] = None,
    workers: Annotated[int, typer.Option(help="Worker processes, one thread each.")] = 2,
    out: Annotated[Path, typer.Option(help="Folder of runs and results; baselines are kept in it.")] = Path(
        "runs/bench"
    ),
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    report: Annotated[Path | None, typer.Option(help="Also write an HTML page.")] = None,
) -> None:
    """Measure an optimizer against AdamW and SGD at equal tuning: verdicts, speed-ups, performance profile."""
    use_threads()
    from trimtab.bench import Contender
    from trimtab.bench import bench as run
    from trimtab.compare import log_grid
    from trimtab.errors import UsageError

    if arm is None and (remedies or lr):
        raise UsageError(
            "--with and --lr belong to an arm: name its optimizer, as in trimtab bench adamw --with z-loss."
        )
    bounds = None
    if lr is not None:
        low, high = log_grid(lr, 2)
        bounds = (low, high)
    contender = None if arm is None else Contender.parse(arm, remedies=remedies or (), lr=bounds)
    label = contender.arm if contender is not None else "baselines"
    with resumable(out), Meter(f"benchmark of {label}") as meter:
        result = run(
            contender,
            folder=out,
            tune_baselines=tune_baselines,
            quick=quick,
            only=task,
            workers=workers,
            progress=meter.jobs,
        )
    if report is not None:
        from trimtab.report.bench import build_bench_report

        build_bench_report(result.to_json(), report)
    if json:
        print_json(result.to_json())
        return
    print_benchmark(result)
    say(f"runs and bench.json: {out}")
    if report is not None:
        say(f"report: {report}")


def print_benchmark(result: Benchmark) -> None:
    """Print verdicts, speed-ups, what tuning found, and the performance profile."""
    if result.budget.quick:
        say("quick: not the protocol, verdicts are withheld", style="bold yellow")
    for judgement in result.judgements.values():
        _print_judgement(result, judgement)
    for name, measured in result.measured.items():
        _print_tuning(name, measured)
    profiles = result.profiles()["steps"]["contenders"]
    if any(entry["ratios"] for entry in profiles):
        say("Performance profile: share of tasks whose target is reached within tau times the steps of the fastest")
        lines = {
            entry["label"]: [
                sum(ratio is not None and ratio <= tau for ratio in entry["ratios"].values()) / len(entry["ratios"])
                for tau in _TAUS
            ]
            for entry in profiles
        }
        for line in curves(_TAUS, lines, height=8):
            say(line)


def _print_judgement(result: Benchmark, judgement: Judgement) -> None:
    quick = result.budget.quick
    rows = []
    for found in judgement.tasks:
        difference, _ = verdict(found.pair)
        speeds = [
            number(value, 3) + ("x" if value is not None else "") for value in (found.speed_steps, found.speed_cpu)
        ]
        word = "-" if quick else f"{found.verdict} (n={found.pair.n})"
        rows.append(
            [
                found.task,
                found.metric,
                number(found.baseline_mean),
                number(found.mean),
                difference,
                number(found.p, 2),
                word,
                *speeds,
            ]
        )
    arm = result.candidate.contender.arm if result.candidate is not None else ""
    title = f"{arm} against {judgement.baseline}, both tuned over {result.budget.points} points"
    heads = ["task", "metric", judgement.baseline, arm, "difference [95%]", "p (Holm)", "verdict", "steps", "CPU time"]
    console().print(table(title, heads, rows, left=2))
    from trimtab.bench.speed import CREDIBLE

    say(f"speed-up in steps, geometric mean: {judgement.steps}")
    say(f"speed-up in CPU time:              {judgement.cpu}")
    say(f"credible over a tuned AdamW: {CREDIBLE[0]:g} to {CREDIBLE[1]:g}", style="dim")
    say()


def _print_tuning(name: str, measured: Measured) -> None:
    rows = []
    for found in measured.results.values():
        point = found.points[found.best].at
        best = ", ".join(f"{key} {_shown(key, value)}" for key, value in point.items())
        rows.append(
            [
                found.task,
                best + (" (lr at the edge of its range)" if found.lr_at_edge else ""),
                f"{found.diverged_points}/{len(found.points)}",
                f"{found.diverged_runs}/{len(found.runs)}",
                number(found.mechanism.get(_MECHANISM), 3),
                number(found.cost, 3),
            ]
        )
    heads = ["task", "best point", "diverged points", "diverged runs", "largest attention logit", "step cost"]
    console().print(table(f"{name}: what tuning found", heads, rows, left=2))
    for task, why in measured.left_out.items():
        say(f"left out: {task}: {why}")


def _shown(name: str, value: Any) -> str:
    """Return a hyper-parameter as people write it: a moment itself, not its distance from 1."""
    if name in ("beta1", "beta2", "momentum"):
        return f"{1 - value:.{max(2, 1 - math.floor(math.log10(value)))}f}"
    return f"{value:.3g}"
