"""A learning-rate sweep: its curves at every size, S and S+ in a table, and S against width."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from trimtab.report.curves import Chart
from trimtab.report.markup import Cell, breakable, cell, figure, section, swatch, table, verdict_badge
from trimtab.report.text import as_number, esc, number
from trimtab.report.verdict import interval

_WORTSMAN = "https://arxiv.org/abs/2309.14322"


def sweep_section(sweep: Mapping[str, Any]) -> tuple[str, list[Chart]]:
    """Return the section on a sweep and its chart."""
    rates = [rate for rate in map(as_number, sweep.get("lrs") or ()) if rate is not None]
    curves = [curve for curve in sweep.get("curves") or () if isinstance(curve, Mapping)]
    pairs = [pair for pair in sweep.get("pairs") or () if isinstance(pair, Mapping)]
    groups = _by_size(curves)
    charts = [
        _chart(rates, members, size, f"chart-sweep-{place}" if place else "chart-sweep")
        for place, (size, members) in enumerate(groups.items())
    ]
    growth = _growth_charts(curves)
    lead = (
        f"Workload <strong>{esc(sweep.get('workload', ''))}</strong>, {len(rates)} learning rates. S is the mean over "
        "them of how much loss a rate costs against the best one, no run counting for more than its loss at "
        f'initialisation (<a href="{_WORTSMAN}" rel="noopener noreferrer">Wortsman et al. 2023</a>); S+ is the same '
        "over the rates from the best one up. Lower is steadier."
    )
    figures = "".join(figure(chart, wide=True) for chart in charts)
    grown = f'<div class="grid">{"".join(figure(chart) for chart in growth)}</div>{_growth(curves)}' if growth else ""
    body = f"<p>{lead}</p>{figures}{_summary(curves, pairs)}{grown}{_losses(rates, curves)}"
    return section("sweep", "Learning-rate sweep", body), [*charts, *growth]


def _by_size(curves: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Return the curves of each size, by its name; the name is empty where the workload's own size was left."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for curve in curves:
        words = [f"{name} {curve[name]}" for name in ("width", "depth") if curve.get(name)]
        groups.setdefault(", ".join(words), []).append(curve)
    return groups or {"": []}


def _chart(rates: Sequence[float], curves: Sequence[Mapping[str, Any]], size: str, anchor: str) -> Chart:
    lines: list[dict[str, Any]] = []
    for index, curve in enumerate(curves):
        initial = as_number(curve.get("initial_loss"))
        s, s_plus = (number(as_number(curve.get(key)), 3) for key in ("S", "S_plus"))
        lines.append(
            {
                "name": f"{curve.get('label', '')} (S = {s}, S+ = {s_plus})",
                "tone": index,
                "dash": 0,
                "mean": [_capped(value, initial) for value in _means(curve)],
                "seeds": [
                    [_capped(as_number(loss), initial) for loss in losses] for losses in curve.get("losses") or ()
                ],
                "best": as_number(curve.get("best_lr")),
            }
        )
    initials = [value for value in (as_number(curve.get("initial_loss")) for curve in curves) if value is not None]
    words = "; ".join(
        f"{curve.get('label', '')}: best at {number(as_number(curve.get('best_lr')))}, "
        f"S {number(as_number(curve.get('S')))}, S+ {number(as_number(curve.get('S_plus')))}"
        for curve in curves
    )
    where = f"Final loss over the learning rate{', ' if size else ''}{size}"
    return Chart(
        anchor=anchor,
        group="Sweep",
        title=where,
        note="lines are means over seeds, small dots are seeds, a ring is at the best rate; the dotted line is the "
        "loss at initialisation",
        summary=f"{where}. {words}.",
        spec={
            "kind": "sweep",
            "lrs": list(rates),
            "lines": lines,
            "initial": max(initials) if initials else None,
            "unit": "final loss",
        },
        legend=tuple((line["name"], line["tone"], line["dash"]) for line in lines),
    )


def _sides(curves: Sequence[Mapping[str, Any]]) -> dict[tuple[str, Any], dict[int, Mapping[str, Any]]]:
    """Return for each arm and depth the curves by width, where there are several widths."""
    sides: dict[tuple[str, Any], dict[int, Mapping[str, Any]]] = {}
    for curve in curves:
        if isinstance(width := curve.get("width"), int):
            sides.setdefault((str(curve.get("side", "")), curve.get("depth")), {})[width] = curve
    return {key: dict(sorted(found.items())) for key, found in sides.items() if len(found) > 1}


def _growth_charts(curves: Sequence[Mapping[str, Any]]) -> list[Chart]:
    charts = []
    for place, ((side, depth), found) in enumerate(_sides(curves).items()):
        seeds = [
            [entry for entry in curve.get("by_seed") or () if isinstance(entry, Mapping)] for curve in found.values()
        ]
        means = [as_number(curve.get("S")) for curve in found.values()]
        words = "; ".join(f"width {width}: {number(mean)}" for width, mean in zip(found, means, strict=True))
        name = f"S against width: {side}" + (f", depth {depth}" if depth else "")
        charts.append(
            Chart(
                anchor=f"chart-sweep-growth-{place}",
                group="Sweep",
                title=name,
                note="one line joins the sweeps of one seed, bars are means; lower is steadier",
                summary=f"{name}. {words}.",
                spec={
                    "kind": "seeds",
                    "labels": [str(width) for width in found],
                    "means": means,
                    "lines": [
                        {
                            "name": f"seed {row}",
                            "y": [as_number(column[row].get("S")) for column in seeds],
                            "diverged": [False] * len(found),
                        }
                        for row in range(min(map(len, seeds), default=0))
                    ],
                    "unit": "S",
                },
            )
        )
    return charts


def _growth(curves: Sequence[Mapping[str, Any]]) -> str:
    sides = _sides(curves)
    widths = sorted({width for found in sides.values() for width in found})
    rows = []
    for (side, depth), found in sides.items():
        name = side + (f", depth {depth}" if depth else "")
        for key, title in (("S", "S"), ("S_plus", "S+"), ("best_lr", "best learning rate")):
            values = [number(as_number(found.get(width, {}).get(key))) for width in widths]
            rows.append([Cell(breakable(name)), cell(title), *(cell(value, numeric=True) for value in values)])
    return table("Sensitivity against width", ["Arm", "", *(f"Width {width}" for width in widths)], rows)


def _summary(curves: Sequence[Mapping[str, Any]], pairs: Sequence[Mapping[str, Any]]) -> str:
    verdicts = {str(pair.get("arm")): pair for pair in pairs if pair.get("quantity", "S") == "S"}
    tones = [(curve, tone) for members in _by_size(curves).values() for tone, curve in enumerate(members)]
    rows = []
    for curve, tone in tones:
        numbers = (curve.get("S"), curve.get("S_plus"), curve.get("best_lr"), curve.get("initial_loss"))
        means = [value for value in _means(curve) if value is not None]
        rows.append(
            [
                Cell(swatch(tone) + breakable(curve.get("label", ""))),
                *(cell(number(as_number(value)), numeric=True) for value in numbers),
                cell(number(min(means, default=None)), numeric=True),
            ]
        )
        if verdicts:
            pair = verdicts.get(str(curve.get("label")))
            badge = verdict_badge(str(pair.get("verdict", ""))) if pair else "baseline"
            rows[-1].append(Cell(f"{badge} <small>{esc(interval(pair))}</small>" if pair else badge))
    heads = ["Curve", "S", "S+", "Best learning rate", "Loss at initialisation", "Lowest final loss"]
    heads += ["S against the baseline"] if verdicts else []
    return table("Sensitivity to the learning rate", heads, rows)


def _losses(rates: Sequence[float], curves: Sequence[Mapping[str, Any]]) -> str:
    columns = [_means(curve) for curve in curves]
    rows = [
        [
            cell(number(rate)),
            *(cell(number(column[row] if row < len(column) else None), numeric=True) for column in columns),
        ]
        for row, rate in enumerate(rates)
    ]
    heads = ["Learning rate", *(str(curve.get("label", "")) for curve in curves)]
    body = table("Mean final loss at each learning rate", heads, rows)
    return f"<details><summary>All losses</summary>{body}</details>"


def _means(curve: Mapping[str, Any]) -> list[float | None]:
    given = curve.get("mean")
    if isinstance(given, (list, tuple)):
        return [as_number(value) for value in given]
    result: list[float | None] = []
    for losses in curve.get("losses") or ():
        numbers = [value for value in map(as_number, losses) if value is not None]
        result.append(sum(numbers) / len(numbers) if numbers else None)
    return result


def _capped(value: float | None, initial: float | None) -> float | None:
    """Return a loss no worse than at initialisation: as S counts it; one blow-up would also flatten the rest."""
    if value is None or initial is None:
        return initial if value is None else value
    return min(value, initial)
