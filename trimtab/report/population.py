"""The page of a population: its members' scores, and what the best one was trained with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trimtab.report.curves import Chart
from trimtab.report.markup import cell, figure, section, table
from trimtab.report.page import NO_CHARTS, write_page
from trimtab.report.text import as_number, number

_JADERBERG = "https://arxiv.org/abs/1711.09846"
_SHOWN = 8


def build_population_report(result: Mapping[str, Any], out: str | Path) -> Path:
    """Write one self-contained HTML file on a population.

    Args:
        result: what `Population.to_json` returns.
        out: the file to write; folders that are missing are made.

    Returns:
        The path of the file.

    Raises:
        RecordError: if the file cannot be written.
    """
    path = Path(out)
    title = f"Population based training on {result.get('workload', '')}"
    plan, best = result["plan"], result["best"]
    space: Mapping[str, Mapping[str, Any]] = plan["space"]
    lead = (
        "Members train side by side; a bad one copies a good one, and what it copied is changed a little "
        f'(<a href="{_JADERBERG}" rel="noopener noreferrer">Jaderberg et al. 2017</a>). The score is that on the '
        "workload's test part, which also chose the winner: it is optimistic."
    )
    charts = [_scores(result)] + [
        _schedule(place, name, bool(dimension.get("log")), best["schedule"])
        for place, (name, dimension) in enumerate(space.items())
    ]
    figures = "".join(figure(chart, wide=True) for chart in charts)
    body = f"<p>{lead}</p>{figures}{_members(result, list(space))}{_rows(best, list(space), str(plan['metric']))}"
    write_page(path, title, NO_CHARTS + section("population", "Population", body), charts)
    return path


def _scores(result: Mapping[str, Any]) -> Chart:
    interval, metric = int(result["plan"]["interval"]), str(result["plan"]["metric"])
    ranking = list(result["ranking"])[:_SHOWN]
    lines = []
    for tone, member in enumerate(ranking):
        known = result["members"][member]
        steps = [min((at + 1) * interval, int(known["steps"])) for at in range(len(known["scores"]))]
        lines.append((f"member {member}", tone, steps, known["scores"]))
    all_members = len(result["members"])
    note = f"the best {_SHOWN} of {all_members} members" if all_members > _SHOWN else ""
    words = "; ".join(f"{name}: {number(as_number(scores[-1]))}" for name, _, _, scores in lines)
    return _chart("chart-scores", f"{metric} after each interval", note, f"Last {metric} of members. {words}.", lines)


def _schedule(place: int, name: str, log: bool, schedule: Sequence[Mapping[str, Any]]) -> Chart:
    steps, values = [], []
    for row in schedule:  # a step function: each value holds from its first to its last step
        steps += [int(row["first"]), int(row["last"])]
        values += [row["hyperparameters"][name]] * 2
    words = (
        f"{name} of the best member: {number(as_number(values[0]))} at first, {number(as_number(values[-1]))} at last."
    )
    line = (name, place, steps, values)
    return _chart(f"chart-schedule-{place}", f"{name} of the best member", "", words, [line], log=log)


def _chart(
    anchor: str,
    title: str,
    note: str,
    summary: str,
    lines: Sequence[tuple[str, int, Sequence[int], Sequence[Any]]],
    *,
    log: bool = False,
) -> Chart:
    drawn = [
        {"name": name, "tone": tone, "dash": 0, "x": list(steps), "y": [as_number(v) for v in values], "marks": []}
        for name, tone, steps, values in lines
    ]
    return Chart(
        anchor=anchor,
        group="Population",
        title=title,
        note=note,
        summary=summary,
        spec={
            "kind": "curve",
            "log": log,
            "steps": [0, max((steps[-1] for _, _, steps, _ in lines), default=1)],
            "unit": "",
            "share": False,
            "lines": drawn,
            "bands": [],
        },
        legend=tuple((name, tone, 0) for name, tone, _, _ in lines) if len(lines) > 1 else (),
    )


def _members(result: Mapping[str, Any], names: Sequence[str]) -> str:
    rows = []
    for member in result["ranking"]:
        known = result["members"][member]
        others = [other for other in known["ancestors"] if other != member]
        rows.append(
            [
                cell(member),
                cell("diverged" if known["diverged"] else number(as_number(known["score"])), numeric=True),
                *(cell(number(known["hyperparameters"][name]), numeric=True) for name in names),
                cell(known["exploits"], numeric=True),
                cell(", ".join(map(str, others)) or "its own"),
            ]
        )
    heads = [
        "Member",
        f"Last {result['plan']['metric']}",
        *(f"Last {name}" for name in names),
        "Copied",
        "Weights from",
    ]
    return table(f"Members, the best first; {number(result['steps'])} steps in all", heads, rows)


def _rows(best: Mapping[str, Any], names: Sequence[str], metric: str) -> str:
    rows = [
        [
            cell(f"{row['first']} to {row['last']}"),
            cell(row["member"], numeric=True),
            *(cell(number(row["hyperparameters"][name]), numeric=True) for name in names),
            cell(number(as_number(row["score"])), numeric=True),
        ]
        for row in best["schedule"]
    ]
    return table(f"What member {best['member']}, the best, was trained with", ["Steps", "Member", *names, metric], rows)
