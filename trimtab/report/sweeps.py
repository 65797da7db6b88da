"""A learning-rate sweep: its curves, and S and S+ in a table."""

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
    chart = _chart(rates, curves)
    lead = (
        f"Workload <strong>{esc(sweep.get('workload', ''))}</strong>, {len(rates)} learning rates. S is the mean over "
        "them of how much loss a rate costs against the best one, no run counting for more than its loss at "
        f'initialisation (<a href="{_WORTSMAN}" rel="noopener noreferrer">Wortsman et al. 2023</a>); S+ is the same '
        "over the rates from the best one up. Lower is steadier."
    )
    body = f"<p>{lead}</p>{figure(chart, wide=True)}{_summary(curves, pairs)}{_losses(rates, curves)}"
    return section("sweep", "Learning-rate sweep", body), [chart]


def _chart(rates: Sequence[float], curves: Sequence[Mapping[str, Any]]) -> Chart:
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
    return Chart(
        anchor="chart-sweep",
        group="Sweep",
        title="Final loss over the learning rate",
        note="lines are means over seeds, small dots are seeds, a ring is at the best rate; the dotted line is the "
        "loss at initialisation",
        summary=f"Final loss over the learning rate. {words}.",
        spec={
            "kind": "sweep",
            "lrs": list(rates),
            "lines": lines,
            "initial": max(initials) if initials else None,
            "unit": "final loss",
        },
        legend=tuple((line["name"], line["tone"], line["dash"]) for line in lines),
    )


def _summary(curves: Sequence[Mapping[str, Any]], pairs: Sequence[Mapping[str, Any]]) -> str:
    verdicts = {str(pair.get("arm")): pair for pair in pairs if pair.get("quantity", "S") == "S"}
    rows = []
    for index, curve in enumerate(curves):
        numbers = (curve.get("S"), curve.get("S_plus"), curve.get("best_lr"), curve.get("initial_loss"))
        means = [value for value in _means(curve) if value is not None]
        rows.append(
            [
                Cell(swatch(index) + breakable(curve.get("label", ""))),
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
