"""A comparison of arms: its table and its charts of paired seeds and differences."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from trimtab.report.curves import Chart
from trimtab.report.markup import Cell, breakable, cell, figure, section, swatch, table, verdict_badge
from trimtab.report.text import NONE, as_number, esc, number, setting
from trimtab.report.verdict import ends, signed

_MAIN = 2
_SHORT = {
    "attention_max_logit": "Largest attention logit",
    "attention_entropy": "Lowest attention entropy",
    "logits_abs_log_z": "Largest mean |log Z|",
    "zero_loss_fraction": "Largest share of zero-loss samples",
    "logits_max": "Largest output logit",
    "grad_norm": "Largest gradient norm",
    "activation_max": "Largest activation",
    "dead_fraction": "Largest share of dead units",
    "attention_entropy_ratio": "Lowest share of the possible entropy",
}


def comparison_section(comparison: Mapping[str, Any]) -> tuple[str, list[Chart]]:
    """Return the section on a comparison and its charts."""
    arms = [arm for arm in comparison.get("arms") or () if isinstance(arm, Mapping)]
    pairs = [pair for pair in comparison.get("pairs") or () if isinstance(pair, Mapping)]
    metric = str(comparison.get("metric", "loss"))
    seeds = list(comparison.get("seeds") or sorted({outcome.get("seed") for arm in arms for outcome in _outcomes(arm)}))
    lead = (
        f"Workload <strong>{esc(comparison.get('workload', ''))}</strong>, {len(arms)} arms, {len(seeds)} paired "
        f"{'seed' if len(seeds) == 1 else 'seeds'} (same initialisation, same batches). A run that diverged counts "
        "with its loss at initialisation."
    )
    charts = [
        chart
        for chart in (_seeds_chart(arms, seeds, metric), _differences_chart(comparison, arms, pairs, seeds, metric))
        if chart
    ]
    figures = "".join(figure(chart) for chart in charts)
    names = {key for arm in arms for outcome in _outcomes(arm) for key in _mechanism(outcome)}
    order = [*_SHORT, *sorted(names - set(_SHORT))]
    mechanisms = [key for key in order if key in names]
    body = (
        f"<p>{lead}</p>{_table(arms, pairs, seeds, metric, mechanisms[:_MAIN])}"
        f'<div class="grid fit">{figures}</div>{_mechanisms(arms, mechanisms)}{_settings(arms)}'
    )
    return section("comparison", "Comparison", body), charts


def _table(
    arms: Sequence[Mapping[str, Any]],
    pairs: Sequence[Mapping[str, Any]],
    seeds: Sequence[Any],
    metric: str,
    mechanisms: Sequence[str],
) -> str:
    against = {str(pair.get("arm")): pair for pair in pairs}
    heads = ["Arm", f"Final {metric} (mean)", "Diverged", "Verdict", "Difference", "Interval", "n"]
    heads += [_SHORT.get(key, key.replace("_", " ")) for key in mechanisms] + ["CPU ms / step"]
    rows = []
    for index, arm in enumerate(arms):
        label = str(arm.get("label", ""))
        outcomes = _outcomes(arm)
        pair = against.get(label)
        diverged = sum(bool(outcome.get("diverged")) for outcome in outcomes)
        costs = [cost for cost in (as_number(outcome.get("cpu_seconds_per_step")) for outcome in outcomes) if cost]
        cost = statistics.median(costs) if costs else None
        rows.append(
            [
                Cell(f"{swatch(index)}{breakable(label)}"),
                cell(number(_mean(_values(arm, seeds, metric))), numeric=True),
                cell(f"{diverged} of {len(outcomes)}", numeric=True, marked=diverged > 0),
                Cell(verdict_badge(str(pair.get("verdict", ""))) if pair else "baseline"),
                cell(signed(as_number(pair.get("mean"))) if pair else NONE, numeric=True),
                cell(ends(pair) if pair else NONE, numeric=True),
                cell(pair.get("n", NONE) if pair else NONE, numeric=True),
                *(_mechanism_cell(arm, key) for key in mechanisms),
                cell(number(None if cost is None else 1000 * cost, 3), numeric=True),
            ]
        )
    return table(
        f"Means over seeds, {metric} at the end of training; difference from the baseline, paired by seed", heads, rows
    )


def _mechanisms(arms: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> str:
    """Return the table of every explaining signal, where the main table has no room for all."""
    if len(keys) <= _MAIN:
        return ""
    heads = ["Worst value over a run", *(str(arm.get("label", "")) for arm in arms)]
    rows = [
        [cell(_SHORT.get(key, key.replace("_", " "))), *(_mechanism_cell(arm, key) for arm in arms)] for key in keys
    ]
    body = table("Signals that explain the outcome: the worst value over each run, mean over seeds", heads, rows)
    return f"<details><summary>All signals that explain the outcome</summary>{body}</details>"


def _mechanism_cell(arm: Mapping[str, Any], key: str) -> Cell:
    return cell(number(_mean([_mechanism(outcome).get(key) for outcome in _outcomes(arm)])), numeric=True)


def _settings(arms: Sequence[Mapping[str, Any]]) -> str:
    settings = [_mapping(arm.get("settings")) for arm in arms]
    keys = list(dict.fromkeys(key for entry in settings for key in entry))
    if not keys:
        return ""
    rows = []
    for key in keys:
        values = [setting(entry.get(key)) for entry in settings]
        rows.append([cell(key), *(cell(value, marked=len(set(values)) > 1) for value in values)])
    heads = ["Setting", *(str(arm.get("label", "")) for arm in arms)]
    body = table("Settings of the arms; those that differ are marked", heads, rows)
    return f"<details><summary>Settings of the arms</summary>{body}</details>"


def _seeds_chart(arms: Sequence[Mapping[str, Any]], seeds: Sequence[Any], metric: str) -> Chart | None:
    if not arms or not seeds:
        return None
    columns = [_values(arm, seeds, metric) for arm in arms]
    lines = [
        {
            "name": f"seed {seed}",
            "y": [column[row] for column in columns],
            "diverged": [bool((_of_seed(arm, seed) or {}).get("diverged")) for arm in arms],
        }
        for row, seed in enumerate(seeds)
    ]
    labels = [str(arm.get("label", "")) for arm in arms]
    means = [_mean(column) for column in columns]
    words = "; ".join(f"{label}: mean {number(mean)}" for label, mean in zip(labels, means, strict=True))
    return Chart(
        anchor="chart-comparison-seeds",
        group="Comparison",
        title=f"Final {metric} of each seed",
        note="one line joins the runs of one seed; bars are means, crosses are runs that diverged",
        summary=f"Final {metric} by arm. {words}.",
        spec={"kind": "seeds", "labels": labels, "means": means, "lines": lines, "unit": metric},
    )


def _differences_chart(
    comparison: Mapping[str, Any],
    arms: Sequence[Mapping[str, Any]],
    pairs: Sequence[Mapping[str, Any]],
    seeds: Sequence[Any],
    metric: str,
) -> Chart | None:
    by_label = {str(arm.get("label", "")): arm for arm in arms}
    places = {label: index for index, label in enumerate(by_label)}
    rows = []
    for pair in pairs:
        label, baseline = str(pair.get("arm", "")), str(pair.get("baseline", ""))
        treated, base = by_label.get(label, {}), by_label.get(baseline, {})
        both = zip(_values(treated, seeds, metric), _values(base, seeds, metric), strict=True)
        dots = [own - theirs for own, theirs in both if own is not None and theirs is not None]
        rows.append(
            {
                "label": label,
                "tone": places.get(label, 0),
                "verdict": str(pair.get("verdict", "")),
                "mean": as_number(pair.get("mean")),
                "low": as_number(pair.get("low")),
                "high": as_number(pair.get("high")),
                "dots": dots,
            }
        )
    if not rows:
        return None
    words = "; ".join(
        f"{pair.get('arm')}: {pair.get('verdict')}, mean {signed(as_number(pair.get('mean')))}" for pair in pairs
    )
    return Chart(
        anchor="chart-comparison-differences",
        group="Comparison",
        title=f"Difference in {metric} from {pairs[0].get('baseline', 'the baseline')}",
        note="dots are seeds, the diamond is the mean with its interval; "
        f"{'right' if comparison.get('higher_is_better') else 'left'} of 0 is better",
        summary=f"Paired differences in {metric}. {words}.",
        spec={"kind": "differences", "rows": rows, "unit": f"difference in {metric}"},
    )


def _outcomes(arm: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [outcome for outcome in arm.get("outcomes") or () if isinstance(outcome, Mapping)]


def _of_seed(arm: Mapping[str, Any], seed: Any) -> Mapping[str, Any] | None:
    return next((outcome for outcome in _outcomes(arm) if outcome.get("seed") == seed), None)


def _metric(outcome: Mapping[str, Any], metric: str) -> float | None:
    own = outcome.get(metric)
    return as_number(_mapping(outcome.get("metrics")).get(metric) if own is None else own)


def _values(arm: Mapping[str, Any], seeds: Sequence[Any], metric: str) -> list[float | None]:
    """Return an arm's value for each seed: as the comparison counted it, or else as its outcomes say."""
    counted = arm.get("values")
    if isinstance(counted, (list, tuple)) and len(counted) == len(seeds):
        return [as_number(value) for value in counted]
    return [_metric(_of_seed(arm, seed) or {}, metric) for seed in seeds]


def _mechanism(outcome: Mapping[str, Any]) -> Mapping[str, Any]:
    return _mapping(outcome.get("mechanism"))


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _mean(values: Sequence[Any]) -> float | None:
    numbers = [value for value in map(as_number, values) if value is not None]
    return sum(numbers) / len(numbers) if numbers else None
