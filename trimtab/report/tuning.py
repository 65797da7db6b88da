"""The page of a tuning: how the best value fell, what each value of the space did, and why trials went wrong."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trimtab.report.markup import GLYPHS, Cell, cell, section, severity_badge, table
from trimtab.report.page import write_page
from trimtab.report.text import as_number, esc, number, setting

_WIDTH, _HEIGHT = 640, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 14, 14, 40
_LISTED = 200
_PED_ANOVA = "https://arxiv.org/abs/2304.10255"
_SHAPES = {"circle": "disc", "rect": "square"}
_STATUS = {"finished": (0, "circle"), "pruned": (1, "rect"), "failed": (3, "rect"), "running": (5, "circle")}


def build_tuning_report(tuning: Mapping[str, Any], out: str | Path) -> Path:
    """Write one self-contained HTML file on a tuning.

    Args:
        tuning: what `Tuning.to_json` returns.
        out: the file to write; folders that are missing are made.

    Returns:
        The path of the file.

    Raises:
        RecordError: if the file cannot be written.
    """
    path = Path(out)
    plan = tuning.get("plan") or {}
    trials = [trial for trial in tuning.get("trials") or () if isinstance(trial, Mapping)]
    metric = str(plan.get("metric", "loss"))
    title = f"Tuning of {tuning.get('subject', '')}"
    sections = [
        section("history", "History", _history(trials, metric, maximize=bool(plan.get("maximize")))),
        section("best", "Best trials", _best(tuning, trials, metric)),
        section("values", "What each value did", _slices(tuning, trials, metric)),
        section("findings", "Why trials went wrong", _findings(tuning, trials)),
        section("trials", "All trials", _all(trials, metric)),
    ]
    counts = ", ".join(f"{count} {status}" for status, count in (tuning.get("counts") or {}).items())
    facts = ", ".join(f"{name} {setting(plan[name])}" for name in ("sampler", "seed", "metric") if name in plan)
    lead = f"<p>{esc(len(trials))} trials ({esc(counts)}); {esc(facts)}.</p>"
    write_page(path, title, "".join(sections), lead=lead)
    return path


def _history(trials: Sequence[Mapping[str, Any]], metric: str, *, maximize: bool) -> str:
    points = [(float(trial["number"]), value, trial) for trial in trials if (value := _value(trial)) is not None]
    if not points:
        return "<p>No trial has a value.</p>"
    best: list[tuple[float, float]] = []
    for at, value, trial in points:
        if trial.get("ranked"):
            last = best[-1][1] if best else value
            best.append((at, max(last, value) if maximize else min(last, value)))
    words = f"the line is the best {metric} so far; {_legend(trials)}"
    return _scatter("Value of each trial", "trial", metric, points, line=best, words=words)


def _best(tuning: Mapping[str, Any], trials: Sequence[Mapping[str, Any]], metric: str) -> str:
    best = tuning.get("best")
    if not isinstance(best, Mapping):
        return "<p>No trial has a value.</p>"
    maximize = bool((tuning.get("plan") or {}).get("maximize"))
    ranked = sorted(
        (trial for trial in trials if trial.get("ranked")),
        key=lambda trial: (-1 if maximize else 1) * (_value(trial) or 0.0),
    )
    arm = f"<p>The best as an arm: <code>{esc(best['arm'])}</code></p>" if best.get("arm") else ""
    return arm + _table("The ten best", ranked[:10], metric)


def _slices(tuning: Mapping[str, Any], trials: Sequence[Mapping[str, Any]], metric: str) -> str:
    importance = tuning.get("importance") or {}
    rows = [[cell(name), cell(f"{share:.0%}", numeric=True)] for name, share in importance.items()]
    shares = table("Share in how much results differ", ["value", "share"], rows) if rows else ""
    note = (
        f'<p>Shares by <a href="{_PED_ANOVA}" rel="noopener noreferrer">PED-ANOVA</a> (Watanabe et al. 2023), over the '
        "values that every trial with a result has.</p>"
        if rows
        else "<p>Too few trials for shares.</p>"
    )
    charts = []
    space = (tuning.get("plan") or {}).get("space") or {}
    names = list(dict.fromkeys(name for trial in trials for name in trial.get("values") or ()))
    for name in sorted(names, key=lambda name: -float(importance.get(name, 0.0))):
        seen = [(trial["values"][name], value, trial) for trial in trials
                if name in (trial.get("values") or {}) and (value := _value(trial)) is not None]  # fmt: skip
        choices = (space.get(name) or {}).get("values")
        if choices is None and any(as_number(drawn) is None for drawn, _, _ in seen):
            choices = sorted({str(drawn) for drawn, _, _ in seen})
        log = bool((space.get(name) or {}).get("log"))
        if choices is not None:
            labels = [str(choice) for choice in choices]
            points = [(float(labels.index(str(drawn))), value, trial) for drawn, value, trial in seen
                      if str(drawn) in labels]  # fmt: skip
            charts.append(_scatter(name, name, metric, points, ticks=labels))
        else:
            points = [(float(drawn), value, trial) for drawn, value, trial in seen]
            charts.append(_scatter(name, name, metric, points, log=log))
    return note + shares + "".join(charts)


def _findings(tuning: Mapping[str, Any], trials: Sequence[Mapping[str, Any]]) -> str:
    found = tuning.get("findings") or {}
    rows = [
        [
            cell(name),
            _badge(row),
            cell(row.get("count"), numeric=True),
            cell(", ".join(map(str, row.get("trials") or ()))),
        ]
        for name, row in found.items()
    ]
    body = table("Findings over all trials", ["finding", "severity", "trials", "which"], rows) if rows else ""
    reasons = [[cell(trial["number"]), cell(trial["status"]), cell(trial["reason"])] for trial in trials
               if trial.get("reason")]  # fmt: skip
    body += table("Trials that were stopped or failed", ["trial", "status", "reason"], reasons) if reasons else ""
    return body or "<p>Nothing was found in any trial.</p>"


def _badge(row: Mapping[str, Any]) -> Cell:
    severity = str(row.get("severity"))
    return Cell(severity_badge(severity)) if severity in GLYPHS else cell(severity)


def _all(trials: Sequence[Mapping[str, Any]], metric: str) -> str:
    more = f"<p>The first {_LISTED}; all are in tune.json.</p>" if len(trials) > _LISTED else ""
    return f"<details><summary>Every trial</summary>{more}{_table('Trials', trials[:_LISTED], metric)}</details>"


def _table(caption: str, trials: Sequence[Mapping[str, Any]], metric: str) -> str:
    names = list(dict.fromkeys(name for trial in trials for name in trial.get("values") or ()))
    rows = [
        [
            cell(trial["number"]),
            *(cell(setting((trial.get("values") or {}).get(name, ""))) for name in names),
            cell(trial.get("status")),
            cell(", ".join(str(entry.get("name")) for entry in trial.get("findings") or ())),
            cell(number(_value(trial)), numeric=True),
        ]
        for trial in trials
    ]
    return table(caption, ["trial", *names, "status", "findings", metric], rows)


def _legend(trials: Sequence[Mapping[str, Any]]) -> str:
    known = dict.fromkeys(str(trial.get("status")) for trial in trials)
    return ", ".join(f"{_SHAPES[_STATUS.get(status, (0, 'circle'))[1]]}: {status}" for status in known)


def _value(trial: Mapping[str, Any]) -> float | None:
    return as_number(trial.get("value"))


def _scatter(
    title: str,
    across: str,
    up: str,
    points: Sequence[tuple[float, float, Mapping[str, Any]]],
    *,
    line: Sequence[tuple[float, float]] = (),
    ticks: Sequence[str] = (),
    log: bool = False,
    words: str = "",
) -> str:
    """Return a drawing of points, one for each trial, with what a point is in its tooltip."""
    points = [point for point in points if not log or point[0] > 0]
    if not points:
        return ""
    place = math.log10 if log else float
    xs, ys = [place(point[0]) for point in points], [point[1] for point in points]
    low, high = (-0.5, len(ticks) - 0.5) if ticks else (min(xs), max(xs))
    bottom, top = min(ys), max(ys)
    # A lone value still has a span, also where adding 1 to it changes nothing.
    high, top = (b if b > a else a + max(1.0, abs(a)) for a, b in ((low, high), (bottom, top)))

    def x(value: float) -> float:
        return round(_LEFT + (place(value) - low) / (high - low) * (_WIDTH - _LEFT - _RIGHT), 1)

    def y(value: float) -> float:
        return round(_HEIGHT - _BOTTOM - (value - bottom) / (top - bottom) * (_HEIGHT - _TOP - _BOTTOM), 1)

    parts = [
        f'<path d="M{_LEFT} {_TOP}V{_HEIGHT - _BOTTOM + 4}H{_WIDTH - _RIGHT}" fill="none" stroke="currentColor" '
        'opacity="0.4"/>'
    ]
    for step in range(4):
        value = bottom + (top - bottom) * step / 3
        parts.append(_label(_LEFT - 8, y(value) + 4, number(value, 3), "end"))
    if ticks:
        parts += [_label(x(float(at)), _HEIGHT - 18, text, "middle") for at, text in enumerate(ticks)]
    else:
        for step in range(4):
            at = low + (high - low) * step / 3
            value = 10**at if log else at
            parts.append(_label(x(value), _HEIGHT - 18, number(float(f"{value:.3g}"), 3), "middle"))
    parts.append(_label((_LEFT + _WIDTH) / 2, _HEIGHT - 3, across + (", logarithmic" if log else ""), "middle"))
    if line:
        path = "".join(f"{'L' if at else 'M'}{x(a)} {y(b)}" for at, (a, b) in enumerate(line))
        parts.append(f'<path d="{path}" fill="none" stroke="currentColor" stroke-width="1.5" opacity="0.6"/>')
    for at, value, trial in points:
        tone, shape = _STATUS.get(str(trial.get("status")), (0, "circle"))
        tip = f"<title>trial {esc(trial['number'])}: {esc(up)} {esc(number(value))}, {esc(trial.get('status'))}</title>"
        a, b = x(at), y(value)
        where = f'cx="{a}" cy="{b}" r="4"' if shape == "circle" else f'x="{a - 4}" y="{b - 4}" width="8" height="8"'
        parts.append(f'<{shape} {where} class="tone{tone}" fill-opacity="0.7">{tip}</{shape}>')
    note = f'<p class="note">{esc(words)}</p>' if words else ""
    label = f"{title}: {up} over {across}, {len(points)} trials"
    frame = f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" width="100%" role="img" aria-label="{esc(label)}">'
    caption = f"<figcaption><h4>{esc(title)}</h4>{note}</figcaption>"
    return f'<figure class="chart-card wide">{caption}{frame}{"".join(parts)}</svg></figure>'


def _label(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}" font-size="11" fill="currentColor">{esc(text)}</text>'
