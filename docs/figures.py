"""Tables of measured results: benchmarks' committed JSON, and the outcomes on the Cards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tables import prose, table

from trimtab.bench import SUITE
from trimtab.catalogue import methods
from trimtab.names import ROOMS

ROOT = Path(__file__).parents[1]


def measured(name: str) -> tuple[dict[str, Any], str]:
    """Return a benchmark's committed result, and a line that says where it comes from."""
    document = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))
    machine = document["environment"]
    source = f"Measured by `{document['command']}` on {machine['processor']}, torch {machine['torch']}."
    return document["result"], source


def optimizer_cost() -> str:
    """Return the table of what an optimizer's step costs, by size of the model."""
    result, source = measured("optim")
    parts = [source]
    for size, rows in result["table"].items():
        lines = []
        for name, row in rows.items():
            if "failed" in row:
                lines.append((name, prose(row["failed"]), "", "", ""))
                continue
            cells = (row["ratio"]["median"], row["per_byte"], row["state_bytes_per_parameter"])
            lines.append((name, *(f"{cell:.2f}" for cell in cells), f"{row['first_step_seconds']:.1f}"))
        head = ("optimizer", "time / fused AdamW", "the same per byte", "state bytes a parameter", "first step, s")
        parts.append(f"### {size} parameters\n\n{table(head, lines)}")
    return "\n\n".join(parts)


def conformance() -> str:
    """Return the table of agreement with other implementations."""
    result, source = measured("conformance")
    lines = [
        (
            row["ours"],
            prose(f"{row['peer']} {row.get('version', '')}"),
            prose(row["settings"]),
            row["dtype"],
            f"{row['drift']:.1e}" if "drift" in row else "",
            prose(f"{row['verdict']}{': ' if row.get('why') else ''}{row.get('why', '')}"),
        )
        for row in result["rows"]
    ]
    return source + "\n\n" + table(("ours", "peer", "settings", "dtype", "drift", "verdict"), lines)


def bench_tasks() -> str:
    """Return the table of the benchmark's tasks."""
    rows = []
    for task in SUITE:
        settings = task.settings()
        size = f"{settings.steps} steps of {settings.batch_size}"
        rows.append(
            (task.name, f"[{task.workload}](workloads.md#{task.workload})", prose(task.shows), size, task.metric)
        )
    return table(("task", "workload", "shows", "run", "what counts"), rows)


def bench_results() -> str:
    """Return the benchmark's results: against AdamW, task by task, and the scores of the performance profile."""
    if not (ROOT / "benchmarks" / "results" / "bench.json").exists():
        return "No contender has been measured yet.\n"
    result, source = measured("bench")
    rows = result["contenders"]
    against = {row["arm"]: row["judgements"][0] for row in rows if row["judgements"]}
    scores = {
        unit: {entry["label"]: entry["score"] for entry in result["profiles"][unit]["contenders"]}
        for unit in ("steps", "cpu")
    }
    head = (
        "arm",
        "better",
        "no evidence",
        "worse",
        "speed-up, steps",
        "speed-up, CPU time",
        "score, steps",
        "score, CPU",
    )
    overall = []
    for row in rows:
        arm, found = row["arm"], against.get(row["arm"])
        words = [entry["verdict"] for entry in found["tasks"]] if found else []
        counts = [str(words.count(word)) if found else "" for word in ("better", "no evidence", "worse")]
        speeds = [_speed(found[f"speed_{unit}"]) if found else "baseline" for unit in ("steps", "cpu")]
        overall.append((f"`{arm}`", *counts, *speeds, *(_rounded(scores[unit].get(arm)) for unit in ("steps", "cpu"))))
    parts = [source, f"### Against AdamW\n\n{table(head, overall)}"]
    parts += [f"### {task.name}\n\n{_bench_task(rows, against, task.name)}" for task in SUITE]
    return "\n\n".join(parts)


def _bench_task(rows: list[dict[str, Any]], against: dict[str, Any], name: str) -> str:
    """Return the table of one task."""
    lines = []
    for row in rows:
        own = next((found for found in row["tasks"] if found["task"] == name), None)
        if own is None:
            lines.append((f"`{row['arm']}`", prose(row["left_out"].get(name, "")), "", "", "", "", "", ""))
            continue
        found = next((one for one in against.get(row["arm"], {"tasks": ()})["tasks"] if one["task"] == name), None)
        mean = found["mean"] if found else sum(own["values"]) / len(own["values"])
        verdict, difference, speed = "baseline", "", ""
        if found:
            pair = found["pair"]
            verdict = f"{found['verdict']} (n={pair['n']}, p={found['p']:.2g})"
            difference = f"{pair['mean']:+.3g} [{pair['low']:+.3g}, {pair['high']:+.3g}]"
            speed = "" if found["speed_steps"] is None else f"{found['speed_steps']:.2f}"
        best = f"{own['best']['lr']:.2g}" + (" (edge)" if own["lr_at_edge"] else "")
        logit = own["mechanism"].get("attention_max_logit")
        lost = f"{own['diverged_points']}/{own['tuning_points']}"
        lines.append((f"`{row['arm']}`", f"{mean:.4g}", difference, verdict, speed, best, lost, _rounded(logit)))
    head = ("arm", "mean", "difference", "verdict", "speed-up", "best lr", "diverged points", "largest attention logit")
    return table(head, lines)


def _speed(found: dict[str, Any]) -> str:
    flag = "" if found["credible"] else ", look for a mistake first"
    return f"{found['mean']:.2f} ({found['low']:.2f} to {found['high']:.2f}{flag})" if found["tasks"] else "none"


def _rounded(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def head_cost() -> str:
    """Return the table of time and memory of a language model's head, by way and vocabulary."""
    result, source = measured("cross_entropy")
    rows = [
        (
            f"{row['vocabulary']:,}",
            row["way"],
            f"{row['time_against_dense']:.2f}",
            f"{row['peak_mib']:,.0f}",
            f"{row['dense_memory_against_it']:.1f}",
            f"{row['without_gradients']:.1f}",
        )
        for row in result["rows"]
    ]
    head = ("classes", "way", "time / dense", "peak, MiB", "dense needs, times", "the same without gradients")
    size = f"{result['tokens']:,} tokens of width {result['width']:,}, forward and backward, float32."
    return f"{source} {size}\n\n{table(head, rows)}"


def layer_cost() -> str:
    """Return the table of what layers cost against their plain counterparts."""
    result, source = measured("layers")
    rows = [
        (
            f"[{row['method']}](methods/{row['method']}.md)",
            prose(row["what"]),
            prose(row["against"]),
            f"{row['time']['median']:.2f} ({row['time']['quartile_low']:.2f} to {row['time']['quartile_high']:.2f})",
            f"{row['memory']:.2f}",
        )
        for row in result["rows"]
    ]
    head = ("method", "layer", "against", "time, ratio (quartiles)", "peak memory, ratio")
    return f"{source}\n\n{table(head, rows)}"


def claims() -> str:
    """Return every experiment of the Cards with its outcome, room by room."""
    parts = []
    for room in ROOMS:
        rows = []
        for card in methods(room=room):
            for run in card.experiments:
                where = run.workload.rpartition(".")[2] if run.is_study else run.workload
                arms = f"`{run.treated or 'defaults'}` against `{run.baseline or 'defaults'}`"
                link = f"[{card.name}](methods/{card.name}.md)"
                rows.append((link, f"`{where}`", arms, run.metric, prose(run.outcome or "not run yet")))
        if rows:
            parts.append(f"## {room}\n\n" + table(("method", "workload or study", "arms", "metric", "outcome"), rows))
    return "\n\n".join(parts)
