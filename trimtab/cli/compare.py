"""`trimtab compare`: arms of a workload on the same seeds, with a verdict."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trimtab.cli.show import Meter, console, number, print_json, resumable, say, table, use_threads

if TYPE_CHECKING:
    from trimtab.compare import Comparison, Paired, StudyComparison

_HEADS = {
    "attention_max_logit": "largest attention logit",
    "attention_entropy": "lowest attention entropy",
    "logits_abs_log_z": "largest |log Z|",
    "dead_fraction": "largest dead share",
    "grad_norm": "largest gradient norm",
}
_CPU = "cpu_seconds"
_STATE = "state_bytes_per_parameter"
_MECHANISMS = 2
"""How many explaining signals the table shows; the JSON has all."""


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("compare")(compare)


def compare(
    workload: Annotated[str, typer.Argument(help="A workload, as trimtab workloads lists them.")],
    arms: Annotated[
        list[str], typer.Option("--arm", help="Such as 'lion,lr=3e-3,with=qk-norm'; the first is the baseline.")
    ],
    seeds: Annotated[int, typer.Option(help="Paired runs of each arm.")] = 5,
    workers: Annotated[int, typer.Option(help="Worker processes, one thread each.")] = 2,
    steps: Annotated[int | None, typer.Option(help="Steps of every run.")] = None,
    metric: Annotated[str, typer.Option(help="loss, accuracy, or a signal such as attention_max_logit.")] = "loss",
    text: Annotated[Path | None, typer.Option(help="A file or folder of text, for language models.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of runs and results; runs/compare-WORKLOAD.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    report: Annotated[Path | None, typer.Option(help="Also write an HTML report.")] = None,
) -> None:
    """Train arms of a workload on the same seeds and give a verdict on each."""
    use_threads()
    from trimtab.compare import compare as run

    folder = out or Path("runs") / f"compare-{workload}"
    with resumable(folder), Meter(f"comparing on {workload}") as meter:
        result = run(
            workload,
            arms,
            folder=folder,
            seeds=seeds,
            steps=steps,
            workers=workers,
            metric=metric,
            higher_is_better="accuracy" in metric,
            text=text,
            progress=meter.jobs,
        )
    if report is not None:
        from trimtab.report import build_report

        build_report(first_runs(result), report, comparison=result.to_json())
    if json:
        print_json(result.to_json())
        return
    print_comparison(result)
    say(f"runs and comparison.json: {folder}")
    if report is not None:
        say(f"report: {report}")


def first_runs(result: Comparison) -> list[Path]:
    """Return the folders of each arm's run on the first seed: one curve an arm is what a chart can show."""
    return [Path(arm.outcomes[0].folder) for arm in result.results if arm.outcomes[0].folder]


def verdict(pair: Paired | None) -> list[str]:
    """Return two cells: the difference from the baseline with its interval, and the verdict with n."""
    if pair is None:
        return ["", "baseline"]
    ends = f"{pair.low:+.3g}, {pair.high:+.3g}" if math.isfinite(pair.low) else "unbounded"
    return [f"{pair.mean:+.3g} [{ends}]", f"{pair.verdict} (n={pair.n})"]


def print_comparison(result: Comparison) -> None:
    """Print the table of a comparison, and the verdicts in words."""
    shared = set.intersection(*(set(arm.mechanism) for arm in result.results))
    mechanisms = [name for name in _HEADS if name in shared][:_MECHANISMS]
    heads = [_HEADS[name] for name in mechanisms]
    if _STATE in shared and len({number(arm.mechanism[_STATE], 3) for arm in result.results}) > 1:
        mechanisms.append(_STATE)
        heads.append("optimizer state, bytes a parameter")
    rows = []
    for arm in result.results:
        values = arm.values(result.metric, higher_is_better=result.higher_is_better)
        spread = f" ±{statistics.stdev(values):.2g}" if len(values) > 1 else ""
        rows.append(
            [
                arm.arm.label,
                f"{number(statistics.fmean(values))}{spread}",
                *(number(arm.mechanism[name], 3) for name in mechanisms),
                f"{arm.cpu_ms_per_step:.3g}",
                f"{arm.diverged}/{len(values)}",
                *verdict(result.pairs.get(arm.arm.label)),
            ]
        )
    better = "higher" if result.higher_is_better else "lower"
    count = len(result.seeds)
    title = f"{result.workload}: final {result.metric} ({better} is better), {count} paired seed{'s' * (count > 1)}"
    heads = ["arm", f"{result.metric} ±sd", *heads, "CPU ms/step", "diverged"]
    heads += ["difference [95%]", "verdict"]
    console().print(table(title, heads, rows))


def print_study(result: StudyComparison) -> None:
    """Print the table of a study's comparison, and the verdict in words."""
    others = [name for name in result.values[0][0] if name not in (result.metric, _CPU)]
    shown = [result.metric, *others[:_MECHANISMS]]
    rows = []
    for place, arm in enumerate(result.arms):
        values = [metrics[result.metric] for metrics in result.values[place]]
        spread = f" ±{statistics.stdev(values):.2g}" if len(values) > 1 else ""
        rows.append(
            [
                arm or "(defaults)",
                f"{number(statistics.fmean(values))}{spread}",
                *(number(result.mean(place, name), 3) for name in shown[1:]),
                f"{result.mean(place, _CPU):.3g}",
                *verdict(result.pairs.get(arm) if place else None),
            ]
        )
    better = "higher" if result.higher_is_better else "lower"
    count = len(result.seeds)
    name = result.study.partition(":")[2]
    title = f"study {name}: {result.metric} ({better} is better), {count} paired seed{'s' * (count > 1)}"
    heads = ["arm", f"{result.metric} ±sd", *shown[1:], "CPU s", "difference [95%]", "verdict"]
    console().print(table(title, heads, rows))
