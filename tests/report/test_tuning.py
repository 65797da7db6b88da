"""The page of a tuning: every trial is drawn, reasons are told, nothing in the data becomes markup."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from trimtab.report.tuning import build_tuning_report

EVIL = "<script>alert(1)</script>"


def _tuning(**changes: Any) -> dict[str, Any]:
    def trial(number: int, status: str, value: float | None, **more: Any) -> dict[str, Any]:
        values = {"lr": 0.01 * (number + 1), "kind": "ab"[number % 2]}
        return {"number": number, "status": status, "value": value, "values": values, "findings": [], "reason": "",
                "arm": "", "ranked": value is not None, **more}  # fmt: skip

    finding = {"name": "lr-too-high", "severity": "critical", "cause": EVIL}
    trials = [
        trial(0, "finished", 0.5, arm="adamw,lr=0.01"),
        trial(1, "pruned", 2.0, findings=[finding], reason=f"lr-too-high: {EVIL}"),
        trial(2, "failed", None, reason="ValueError: no"),
        trial(3, "finished", 0.25),
    ]
    return {
        "subject": f"work {EVIL}",
        "plan": {"metric": "loss", "maximize": False, "sampler": "tpe", "seed": 0,
                 "space": {"lr": {"low": 0.01, "high": 0.1, "log": True}, "kind": {"values": ["a", "b"]}}},
        "counts": {"finished": 2, "pruned": 1, "failed": 1},
        "best": trials[3],
        "importance": {"lr": 0.75, "kind": 0.25},
        "findings": {"lr-too-high": {"count": 1, "severity": "critical", "trials": [1]}},
        "trials": trials,
        **changes,
    }  # fmt: skip


def test_page_shows_trials_reasons_and_shares(tmp_path: Path) -> None:
    page = build_tuning_report(_tuning(), tmp_path / "deep" / "tune.html").read_text()
    history = page.partition('id="history"')[2].partition("</section>")[0]
    assert len(re.findall(r"<title>trial \d", history)) == 3, "those with a value"
    assert "trial 1: loss 2, pruned" in history
    values = page.partition('id="values"')[2].partition("</section>")[0]
    assert values.count("<svg") == 2
    assert "75%" in values
    assert "lr, logarithmic" in values
    findings = page.partition('id="findings"')[2].partition("</section>")[0]
    assert "lr-too-high" in findings
    assert "ValueError: no" in findings
    assert EVIL not in page
    assert "default-src 'none'" in page.replace("&#x27;", "'")


def test_line_of_the_best_falls_with_the_metric(tmp_path: Path) -> None:
    page = build_tuning_report(_tuning(), tmp_path / "tune.html").read_text()
    line = re.search(r'<path d="(M[^"]*)"[^>]*stroke-width="1.5"', page)
    assert line
    heights = [float(point.split(" ")[1]) for point in re.split("[ML]", line[1])[1:]]
    assert len(heights) == 3
    assert heights[0] == heights[1] < heights[2], "down the page is a lower loss"


def test_an_empty_or_damaged_tuning_still_gives_a_page(tmp_path: Path) -> None:
    page = build_tuning_report({"trials": [], "subject": "x"}, tmp_path / "a.html").read_text()
    assert "No trial has a value." in page
    damaged = _tuning(best=None, importance={}, findings={})
    for trial in damaged["trials"]:
        trial["value"] = float("nan")
    page = build_tuning_report(damaged, tmp_path / "b.html").read_text()
    assert "No trial has a value." in page
    assert "Too few trials for shares." in page


@pytest.mark.parametrize("value", [1e300, -1e17, 0.0])
def test_a_lone_trial_of_any_size_has_its_place(tmp_path: Path, value: float) -> None:
    trials = [{"number": 0, "status": "finished", "value": value, "values": {"x": value}, "ranked": True}]
    page = build_tuning_report({"subject": "x", "trials": trials}, tmp_path / "a.html").read_text()
    assert page.count("<title>trial 0") == 2
