"""The page of a benchmark: verdicts and speed-ups by task, the performance profile, and what tuning found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from trimtab.report.markup import Cell, breakable, cell, section, swatch, table, verdict_badge
from trimtab.report.page import write_page
from trimtab.report.text import NONE, as_number, esc, number
from trimtab.report.verdict import ends, signed

_DAHL = "https://arxiv.org/abs/2306.07179"
_DOLAN = "https://arxiv.org/abs/cs/0102001"
_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM = 640, 240, 46, 10, 34


def build_bench_report(result: Mapping[str, Any], out: str | Path) -> Path:
    """Write one self-contained HTML file on a benchmark.

    Args:
        result: what `Benchmark.to_json` returns.
        out: the file to write; folders that are missing are made.

    Returns:
        The path of the file.

    Raises:
        RecordError: if the file cannot be written.
    """
    path = Path(out)
    candidate = result.get("candidate")
    arm = str(candidate["arm"]) if candidate else "baselines"
    title = f"Benchmark of {arm}"
    budget = result["budget"]
    lead = (
        f"Everyone is tuned over {budget['points']} quasi-random points on each task and run again at the best of them "
        f"on {budget['seeds']} paired seeds ({budget['baseline_seeds']} for baselines). Losses count at the end of the "
        "schedule; a run that diverged counts with its loss at initialisation. p is corrected by Holm over the tasks."
    )
    warning = (
        '<p class="lead status-bad">Quick profile: this is not the protocol, and verdicts are withheld.</p>'
        if result.get("protocol") != "full"
        else ""
    )
    body = "".join(_judgement(entry, arm) for entry in result.get("judgements") or ())
    sections = [section("verdicts", "Verdicts", f"{warning}<p>{lead}</p>{body}")] if candidate else []
    sections.append(section("profile", "Performance profile", warning * (not candidate) + _profiles(result)))
    everyone = [*(result.get("baselines") or {}).values(), *([candidate] if candidate else [])]
    sections.append(section("tuning", "What tuning found", "".join(map(_tuning, everyone))))
    write_page(path, title, "".join(sections))
    return path


def _judgement(entry: Mapping[str, Any], arm: str) -> str:
    rows = []
    for found in entry["tasks"]:
        pair = found["pair"]
        rows.append(
            [
                cell(found["task"]),
                cell(found["metric"]),
                cell(number(as_number(found["baseline_mean"])), numeric=True),
                cell(number(as_number(found["mean"])), numeric=True),
                cell(signed(as_number(pair["mean"])), numeric=True),
                cell(ends(pair), numeric=True),
                cell(number(as_number(found["p"]), 2), numeric=True),
                Cell(verdict_badge(found["verdict"]) if found["verdict"] else NONE),
                cell(pair["n"], numeric=True),
                cell(_times(found["speed_steps"]), numeric=True),
                cell(_times(found["speed_cpu"]), numeric=True),
            ]
        )
    baseline = str(entry["baseline"])
    heads = ["Task", "Metric", baseline, arm, "Difference", "95 % interval", "p (Holm)", "Verdict", "n"]
    heads += ["Speed-up, steps", "Speed-up, CPU time"]
    speeds = "".join(
        f"<li>Speed-up in {unit}, geometric mean: <strong>{_times(found['mean'])}</strong> "
        f"({number(as_number(found['low']), 3)} to {number(as_number(found['high']), 3)}, {found['tasks']} tasks)"
        + ("" if found["credible"] else " <strong>above the credible range: look for a mistake first</strong>")
        + "</li>"
        for unit, found in (("steps", entry["speed_steps"]), ("CPU time", entry["speed_cpu"]))
    )
    low, high = entry["speed_steps"]["credible_range"]
    note = f'<p class="note">Credible over a tuned AdamW: {low:g} to {high:g} times.</p>'
    caption = f"{arm} against {baseline}: means over paired seeds"
    return f"<h3>Against {esc(baseline)}</h3>{table(caption, heads, rows)}<ul>{speeds}</ul>{note}"


def _times(value: Any) -> str:
    found = as_number(value)
    return NONE if found is None else f"{number(found, 3)}×"


def _profiles(result: Mapping[str, Any]) -> str:
    lead = (
        "The share of tasks on which a contender reaches the target (AdamW's median final value) within a factor of "
        f'the fastest (<a href="{_DOLAN}" rel="noopener noreferrer">Dolan and Moré 2002</a>, '
        f'<a href="{_DAHL}" rel="noopener noreferrer">Dahl et al. 2023</a>); the score is its mean over factors from 1 '
        "to 4. Tasks that AdamW does not learn have no target."
    )
    parts = [f"<p>{lead}</p>"]
    for unit, name in (("steps", "steps"), ("cpu", "CPU time")):
        found = result["profiles"][unit]
        if any(entry["curve"] for entry in found["contenders"]):
            parts.append(profile_figure(found, name))
    return "".join(parts)


def profile_figure(found: Mapping[str, Any], unit: str) -> str:
    """Return a performance profile as a drawing that needs no script.

    Args:
        found: one of `profiles`.
        unit: what the time is counted in, in words.
    """
    top = float(found["tau_max"])
    entries: Sequence[Mapping[str, Any]] = found["contenders"]

    def x(tau: float) -> float:
        return _LEFT + (tau - 1) / (top - 1) * (_WIDTH - _LEFT - 12)

    def y(share: float) -> float:
        return _TOP + (1 - share) * (_HEIGHT - _TOP - _BOTTOM)

    marks = []
    for tau in (1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0):
        marks.append(f'<text x="{x(tau):.1f}" y="{_HEIGHT - 16}" text-anchor="middle">{tau:g}</text>')
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        marks.append(f'<text x="{_LEFT - 6}" y="{y(share) + 4:.1f}" text-anchor="end">{share:.0%}</text>')
        marks.append(
            f'<line x1="{_LEFT}" x2="{x(top):.1f}" y1="{y(share):.1f}" y2="{y(share):.1f}" stroke="currentColor" '
            'stroke-opacity="0.15"/>'
        )
    marks.append(
        f'<text x="{(x(1) + x(top)) / 2:.1f}" y="{_HEIGHT - 2}" text-anchor="middle">factor of the fastest</text>'
    )
    lines = []
    for tone, entry in enumerate(entries):
        # Curves that coincide are drawn a little apart.
        shift = 1.5 * (tone - (len(entries) - 1) / 2)
        corners = [(float(tau), float(share)) for tau, share in entry["curve"]]
        for (left, level), (right, after) in pairwise(corners):
            flat = y(level) + shift
            segments = [(x(left), flat, x(right), flat), (x(right), flat, x(right), y(after) + shift)]
            lines += [
                f'<line class="tone{tone % 8}" stroke-width="2" x1="{a:.1f}" y1="{b:.1f}" x2="{c:.1f}" y2="{d:.1f}"/>'
                for a, b, c, d in segments
            ]
    legend = "".join(
        f"<li>{swatch(tone)}{breakable(entry['label'])}&nbsp;(score {number(as_number(entry['score']), 3)})</li>"
        for tone, entry in enumerate(entries)
    )
    words = "; ".join(f"{entry['label']}: score {number(as_number(entry['score']), 3)}" for entry in entries)
    return (
        f'<figure class="chart-card wide"><figcaption><h4>In {esc(unit)}</h4><ul class="legend small">{legend}</ul>'
        f'</figcaption><svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="Performance profile in '
        f'{esc(unit)}. {esc(words)}." font-size="11" fill="currentColor">{"".join(marks)}{"".join(lines)}</svg>'
        "</figure>"
    )


def _tuning(entry: Mapping[str, Any]) -> str:
    rows = []
    names = sorted({name for found in entry["results"] for name in found["mechanism"]})
    for found in entry["results"]:
        best = ", ".join(f"{name} {number(as_number(value), 3)}" for name, value in _readable(found["best"]).items())
        rows.append(
            [
                cell(found["task"]),
                cell(best),
                cell("at its edge" if found["lr_at_edge"] else NONE, marked=bool(found["lr_at_edge"])),
                cell(f"{found['diverged_points']} of {len(found['points'])}", numeric=True),
                cell(f"{found['diverged_runs']} of {len(found['runs'])}", numeric=True),
                cell(number(as_number(found["cost"]), 3), numeric=True),
                *(cell(number(as_number(found["mechanism"].get(name))), numeric=True) for name in names),
            ]
        )
    heads = ["Task", "Best point", "Learning-rate range", "Diverged points", "Diverged runs", "Step cost"]
    heads += [name.replace("_", " ") for name in names]
    left = "".join(f"<li>left out: {esc(task)}: {esc(why)}</li>" for task, why in entry["left_out"].items())
    made = table(f"{entry['arm']}: learning rates from {entry['lr'][0]:g} to {entry['lr'][1]:g}", heads, rows)
    return f"<h3>{esc(entry['arm'])}</h3>{made}" + (f"<ul>{left}</ul>" if left else "")


def _readable(point: Mapping[str, float]) -> dict[str, float]:
    """Return a point with moments as themselves: they are tuned by their distance from 1."""
    return {name: 1 - value if name in ("beta1", "beta2", "momentum") else value for name, value in point.items()}
