"""`coord-check`: tables, a plot and verdicts for people, JSON for programs, a page, and the exit code."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

_PLAN = ["coord-check", "digits-mlp", "--widths=32,64,128,256", "--steps=4", "--seeds=2", "--workers=1"]


def test_prints_writes_and_judges(trimtab: Callable[..., Any]) -> None:
    found = trimtab(*_PLAN, "--both", "--out=out")
    assert found.code == 0, found
    written = json.loads(Path("out/coord-check.json").read_text(), parse_constant=pytest.fail)
    mup, standard = written["checks"]
    assert (mup["parametrization"], mup["flat"], standard["flat"]) == ("mup", True, False)
    assert "digits-mlp, mup: mean |activation| after 4 steps, and its change" in found.out
    assert "mup: 5 flat" in found.out
    assert "o mup   + standard" in found.out
    assert "grows (" in found.out.splitlines()[-2]
    assert f"{standard['modules'][-1]['change_slope']:.2g}" in found.out
    page = Path("out/coord-check.html").read_text()
    assert "Coordinate check of digits-mlp" in page
    assert "default-src 'none'" in page.replace("&#x27;", "'")

    # The jobs are kept: what follows trains nothing.
    failed = trimtab(*_PLAN, "--tolerance=1e-6", "--out=out", "--json")
    assert failed.code == 1
    printed = json.loads(failed.out, parse_constant=pytest.fail)
    assert printed == json.loads(Path("out/coord-check.json").read_text())
    assert [check["flat"] for check in printed["checks"]] == [False]
    alone = trimtab(*_PLAN, "--standard", "--out=out")
    assert alone.code == 0, "standard alone has nothing to fail"
    assert "grows" in alone.out


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["coord-check", "digits-mlb"], "Did you mean 'digits-mlp'?"),
        (["coord-check", "digits-mlp", "--widths=64"], "widths must be three or more different ones"),
        (["coord-check", "digits-mlp", "--widths=a,b,c"], "should be whole numbers joined by commas"),
        (["coord-check", "digits-mlp", "--widths=64,64,128"], "got 64,64,128"),
        (["coord-check", "digits-vit", "--widths=30,32,64"], "width"),
        (["coord-check", "digits-mlp", "--standard", "--both"], "exclude each other"),
        (["coord-check", "digits-mlp", "--steps=0"], "steps must be at least 1, got 0"),
        (["coord-check", "digits-mlp", "--optimizer=lion"], "unknown kind of optimizer 'lion'"),
        (["coord-check"], "WORKLOAD"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], text: str, refused: Callable[..., str]) -> None:
    assert text in refused(*arguments)
