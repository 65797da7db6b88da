"""The page of a learning-rate range test: its curve, and what is read from it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trimtab.report.curves import Chart
from trimtab.report.markup import cell, figure, section, table
from trimtab.report.page import write_page
from trimtab.report.text import as_number, number

_SMITH = "https://arxiv.org/abs/1506.01186"


def build_lr_range_report(result: Mapping[str, Any], out: str | Path) -> Path:
    """Write one self-contained HTML file on a range test.

    Args:
        result: what `LRRange.to_json` or `LRRanges.to_json` returns, with `"workload"` besides.
        out: the file to write; folders that are missing are made.

    Returns:
        The path of the file.

    Raises:
        RecordError: if the file cannot be written.
    """
    path = Path(out)
    title = f"Learning-rate range test on {result.get('workload', '')}"
    chart = _chart(result)
    lead = (
        "The learning rate rises at every step of one short run; the weights are put back afterwards "
        f'(<a href="{_SMITH}" rel="noopener noreferrer">Smith 2017</a>). Below the rates that train, the loss stays '
        "where it is; beyond the largest stable one, it blows up."
    )
    rows = [
        [cell("suggestion: steepest descent"), cell(_shown(result.get("suggestion")), numeric=True)],
        [cell("largest stable: lowest loss"), cell(_shown(result.get("largest_stable")), numeric=True)],
        [cell("the test"), cell(f"{result.get('stopped_because')} after {len(result.get('lrs') or ())} steps")],
    ]
    if result.get("reason"):
        rows.append([cell("note"), cell(result["reason"])])
    seeds = _seeds(result)
    body = f"<p>{lead}</p>{figure(chart, wide=True)}{table('What it found', ['', 'value'], rows)}{seeds}"
    notice = "<noscript><p>The chart needs JavaScript; everything else is readable without it.</p></noscript>"
    write_page(path, title, notice + section("lr-range", "Range test", body), [chart])
    return path


def _seeds(result: Mapping[str, Any]) -> str:
    """Return the table of the seeds' tests, where there are several."""
    tests = [test for test in result.get("tests") or () if isinstance(test, Mapping)]
    if len(tests) < 2:
        return ""
    rows = [
        [
            cell(test.get("seed")),
            cell(_shown(test.get("suggestion")), numeric=True),
            cell(_shown(test.get("largest_stable")), numeric=True),
            cell(test.get("stopped_because")),
        ]
        for test in tests
    ]
    head = f"Each seed; the values above are medians in log, the curve is that of seed {result.get('shown_seed')}"
    return table(head, ["Seed", "Suggestion", "Largest stable", "Stopped because"], rows)


def _shown(value: Any) -> str:
    return "none" if value is None else number(as_number(value))


def _chart(result: Mapping[str, Any]) -> Chart:
    lrs = [as_number(lr) for lr in result.get("lrs") or ()]
    losses = [as_number(loss) for loss in result.get("losses") or ()]
    # A blow-up of many times the first loss would flatten everything before it.
    top = 1.5 * max(abs(loss) for loss in losses[:1] if loss is not None) if losses and losses[0] else None
    curves = [losses, [as_number(loss) for loss in result.get("smoothed") or ()]]
    lines = [
        {
            "name": name,
            "tone": tone,
            "dash": 0,
            "mean": [value if value is None or top is None else min(value, top) for value in curve],
            "seeds": [],
            "best": as_number(result.get(best)),
        }
        for tone, (name, curve, best) in enumerate(
            zip(("loss", "smoothed"), curves, ("suggestion", "largest_stable"), strict=True)
        )
    ]
    return Chart(
        anchor="chart-lr-range",
        group="Range test",
        title="Loss while the learning rate rises",
        note="a ring on the loss is at the suggestion, one on the smoothed loss at the largest stable rate; "
        "losses are cut at one and a half times the first",
        summary=(
            f"Loss while the learning rate rises. Suggestion {_shown(result.get('suggestion'))}, largest stable rate "
            f"{_shown(result.get('largest_stable'))}."
        ),
        spec={"kind": "sweep", "lrs": lrs, "lines": lines, "initial": losses[0] if losses else None, "unit": "loss"},
        legend=tuple((str(line["name"]), tone, 0) for tone, line in enumerate(lines)),
    )
