"""The page of a range test: it says what was found, draws it, and takes names literally."""

from __future__ import annotations

import json
import re

import pytest

from trimtab.errors import RecordError
from trimtab.report.lr_range import build_lr_range_report

HOSTILE = "</script><img src=x onerror=alert(1)>"


def _result(**changes):
    return {
        "workload": "digits-mlp",
        "lrs": [1e-3, 1e-2, 1e-1],
        "losses": [2.0, 1.0, 900.0],
        "smoothed": [2.0, 1.5, 450.0],
        "stopped_because": "diverged",
        "suggestion": 1e-3,
        "largest_stable": 1e-2,
        "reason": "",
        **changes,
    }


def _data(page):
    return json.loads(re.search(r'<script type="application/json" id="report-data">(.*?)</script>', page, re.DOTALL)[1])


def test_draws_the_losses_and_cuts_the_blow_up(tmp_path):
    page = build_lr_range_report(_result(), tmp_path / "new" / "page.html").read_text()
    spec = _data(page)["chart-lr-range"]
    assert spec["lrs"] == [1e-3, 1e-2, 1e-1]
    assert [line["mean"] for line in spec["lines"]] == [[2.0, 1.0, 3.0], [2.0, 1.5, 3.0]]
    assert [line["best"] for line in spec["lines"]] == [1e-3, 1e-2]
    assert "diverged after 3 steps" in page


@pytest.mark.parametrize(
    "changes",
    [
        {"workload": HOSTILE, "reason": HOSTILE},
        {"lrs": [], "losses": [], "smoothed": [], "suggestion": None, "largest_stable": None, "reason": "too short"},
        {"losses": [0.0, 1.0, 2.0]},
    ],
)
def test_any_result_makes_a_page(tmp_path, changes):
    page = build_lr_range_report(_result(**changes), tmp_path / "page.html").read_text()
    assert HOSTILE not in page
    assert (">none<" in page) == (changes.get("suggestion", 1) is None)
    _data(page)


def test_a_file_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RecordError, match="cannot write the report"):
        build_lr_range_report(_result(), tmp_path / "file" / "page.html")
