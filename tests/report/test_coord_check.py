"""The page of a coordinate check: slopes and verdicts in a table, changes relative to the smallest width drawn."""

from __future__ import annotations

import json
import re

import pytest

from trimtab.errors import RecordError
from trimtab.report.coord_check import build_coord_check_report

HOSTILE = "</script><img src=x onerror=alert(1)>"


def _check(**changes):
    module = {
        "module": "head",
        "sizes": [[[1.0, 2.0], [1.0, 2.0], [1.0, 2.0]]],
        "changes": [[[0.0, 0.5], [0.0, 1.0], [0.0, 4.0]]],
        "size_slope": 0.0,
        "change_slope": 1.5,
        "verdict": "grows",
    }
    return {"parametrization": "mup", "widths": [16, 32, 64], "steps": 1, "modules": [{**module, **changes}]}


def _result(**changes):
    return {"workload": "digits-mlp", "checks": [_check(**changes)]}


def _data(page):
    return json.loads(re.search(r'<script type="application/json" id="report-data">(.*?)</script>', page, re.DOTALL)[1])


def test_draws_changes_relative_to_the_smallest_width(tmp_path):
    page = build_coord_check_report(_result(), tmp_path / "new" / "page.html").read_text()
    spec = _data(page)["chart-check-0"]
    assert spec["labels"] == ["16", "32", "64"]
    assert spec["lines"] == [{"name": "head", "y": [0.0, 1.0, 3.0], "diverged": [False, False, False]}]
    assert spec["means"] == [0.0, 1.0, 3.0]
    assert "grows" in page
    assert "1.5" in page


@pytest.mark.parametrize(
    "result",
    [
        {},
        {"workload": HOSTILE, "checks": [_check(module=HOSTILE, verdict=HOSTILE)]},
        _result(changes=[[[0.0, 0.5], [0.0, None], [0.0, 4.0]]], change_slope=None),
        _result(changes=[[[0.0, 0.0], [0.0, 0.0], [0.0, 0.0]]], change_slope=None),
        {"workload": "none", "checks": [{"parametrization": "standard"}]},
    ],
)
def test_any_result_makes_a_page(tmp_path, result):
    page = build_coord_check_report(result, tmp_path / "page.html").read_text()
    assert HOSTILE not in page
    _data(page)


def test_a_file_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RecordError, match="cannot write the report"):
        build_coord_check_report(_result(), tmp_path / "file" / "page.html")
