"""`sweep` over sizes: tables and plots of each, S against width, the report."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


def test_sizes_have_tables_plots_and_a_report(trimtab: Callable[..., Any]) -> None:
    common = ["sweep", "digits-mlp", "--lr=1e-3:1e-1", "--points=2", "--steps=5", "--workers=1", "--out=out"]
    common += ["--width=8,16", "--with=lower-lr"]
    found = trimtab(*common, "--report=report.html")
    assert found.code == 0
    for text in ("digits-mlp, width 8: final loss", "digits-mlp, width 16: final loss", "S against width"):
        assert text in found.out
    data = json.loads(trimtab(*common, "--json").out, parse_constant=pytest.fail)
    assert [(curve["side"], curve["width"]) for curve in data["curves"]] == [
        ("without remedy", 8),
        ("lower-lr", 8),
        ("without remedy", 16),
        ("lower-lr", 16),
    ]
    page = Path("report.html").read_text()
    charts = json.loads(re.search(r'id="report-data">(.*?)</script>', page, re.DOTALL)[1])
    assert {"chart-sweep", "chart-sweep-1", "chart-sweep-growth-0", "chart-sweep-growth-1"} <= set(charts)
    growth = charts["chart-sweep-growth-1"]
    assert growth["labels"] == ["8", "16"]
    assert growth["means"] == [data["curves"][1]["S"], data["curves"][3]["S"]]
    assert growth["lines"][0]["y"] == growth["means"]
    assert "Sensitivity against width" in page


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--width=8,x"], "widths are whole numbers joined by commas, such as 32,64, got '8,x'"),
        (["--depth=0"], "a depth is a whole number of at least 1, got 0"),
        (["--width=8,8"], "different widths"),
    ],
)
def test_wrong_sizes_are_refused(arguments: list[str], text: str, refused: Callable[..., str]) -> None:
    assert text in refused("sweep", "digits-mlp", "--steps=2", *arguments)
