"""The page of a coordinate check: how much each layer moves at each width, with muP and without."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trimtab.report.curves import Chart
from trimtab.report.markup import cell, figure, section, table
from trimtab.report.page import NO_CHARTS, write_page
from trimtab.report.text import as_number, number

_YANG = "https://arxiv.org/abs/2203.03466"
_NAMES = {"mup": "muP", "standard": "Standard parametrisation"}


def build_coord_check_report(result: Mapping[str, Any], out: str | Path) -> Path:
    """Write one self-contained HTML file on a coordinate check.

    Args:
        result: what `workload_coordinate_check` writes.
        out: the file to write; folders that are missing are made.

    Returns:
        The path of the file.

    Raises:
        RecordError: if the file cannot be written.
    """
    path = Path(out)
    title = f"Coordinate check of {result.get('workload', '')}"
    lead = (
        "Models of several widths are trained for a few steps; each layer's activations are then compared with those "
        f'at the start (<a href="{_YANG}" rel="noopener noreferrer">Yang et al. 2021</a>). Under muP they move alike '
        "at every width: the lines stay level. A slope is that of log size over log width."
    )
    checks = [check for check in result.get("checks") or () if isinstance(check, Mapping)]
    charts = [_chart(check, place) for place, check in enumerate(checks)]
    sections = "".join(
        section(f"check-{place}", _name(check), figure(charts[place], wide=True) + _table(check))
        for place, check in enumerate(checks)
    )
    write_page(path, title, f"{NO_CHARTS}<p>{lead}</p>{sections}", charts)
    return path


def _name(check: Mapping[str, Any]) -> str:
    kind = str(check.get("parametrization", ""))
    return _NAMES.get(kind, kind)


def _widths(check: Mapping[str, Any]) -> list[Any]:
    return list(check.get("widths") or ())


def _modules(check: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [entry for entry in check.get("modules") or () if isinstance(entry, Mapping)]


def _last(seeds: Sequence[Any], count: int) -> list[float | None]:
    """Return the geometric mean over seeds of the last step's value, by width."""
    found: list[float | None] = []
    for place in range(count):
        values = [as_number(seed[place][-1]) for seed in seeds]
        positive = [value for value in values if value is not None and value > 0]
        whole = len(positive) == len(values) and positive
        found.append(math.exp(statistics.fmean(map(math.log, positive))) if whole else None)
    return found


def _chart(check: Mapping[str, Any], place: int) -> Chart:
    widths = _widths(check)
    lines: list[dict[str, Any]] = []
    for entry in _modules(check):
        changes = _last(entry.get("changes") or (), len(widths))
        first = changes[0] if changes else None
        heights = [math.log2(value / first) if value and first else None for value in changes]
        lines.append(
            {"name": str(entry.get("module", "")), "y": heights, "diverged": [value is None for value in heights]}
        )
    means = []
    for at in range(len(widths)):
        values = [line["y"][at] for line in lines if line["y"] and line["y"][at] is not None]
        means.append(statistics.fmean(values) if values else None)
    said = ", ".join(f"{width}: {number(mean)}" for width, mean in zip(widths, means, strict=True))
    return Chart(
        anchor=f"chart-check-{place}",
        group="Coordinate check",
        title=f"{_name(check)}: change of each layer's activations by width",
        note="log2 of the change relative to the smallest width; a line is a layer, a bar the mean over layers",
        summary=f"log2 of the change relative to the smallest width, mean over layers. {said}.",
        spec={
            "kind": "seeds",
            "labels": [str(width) for width in widths],
            "means": means,
            "lines": lines,
            "unit": "log2 of relative change",
        },
    )


def _table(check: Mapping[str, Any]) -> str:
    widths = _widths(check)
    rows = []
    for entry in _modules(check):
        sizes, changes = (_last(entry.get(what) or (), len(widths)) for what in ("sizes", "changes"))
        cells = [cell(entry.get("module", ""))]
        for values, slope in ((sizes, "size_slope"), (changes, "change_slope")):
            ends = [values[0], values[-1]] if values else [None, None]
            cells += [cell(_shown(value), numeric=True) for value in (*ends, as_number(entry.get(slope)))]
        verdict = str(entry.get("verdict", ""))
        rows.append([*cells, cell(verdict, marked=verdict not in ("flat", "still"))])
    low, high = (widths[0], widths[-1]) if widths else ("", "")
    heads = ["module", f"size at {low}", f"at {high}", "slope", f"change at {low}", f"at {high}", "slope", "verdict"]
    return table(f"{_name(check)}: after {check.get('steps')} steps", heads, rows)


def _shown(value: float | None) -> str:
    return "none" if value is None else number(value, 3)
