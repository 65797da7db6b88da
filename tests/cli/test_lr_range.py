"""`lr-range`: a table and a suggestion for people, JSON for programs, a page to look at."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trimtab.tune import lr_range


def test_prints_a_table_and_a_suggestion_and_writes_what_it_found(trimtab: Callable[..., Any]) -> None:
    found = trimtab("lr-range", "tabular", "--steps=60", "--out=out")
    assert found.code == 0
    written = json.loads(Path("out/lr-range.json").read_text(), parse_constant=pytest.fail)
    assert (written["kind"], written["workload"], written["stopped_because"]) == ("lr-range", "tabular", "diverged")
    assert f"suggestion: {written['suggestion']:.3g} (steepest descent)" in found.out
    assert f"largest stable: {written['largest_stable']:.3g}" in found.out
    assert f"{written['losses'][0]:.4g}" in found.out
    assert "range test on tabular: " in found.err
    page = Path("out/lr-range.html").read_text()
    assert "Learning-rate range test on tabular" in page
    assert "suggestion: steepest descent" in page
    assert "default-src 'none'" in page.replace("&#x27;", "'")


def test_json_is_what_is_written(trimtab: Callable[..., Any]) -> None:
    found = trimtab("lr-range", "tabular", "--steps=40", "--arm=sgd,momentum=0.9", "--out=out", "--json")
    assert found.code == 0
    printed = json.loads(found.out, parse_constant=pytest.fail)
    assert printed == json.loads(Path("out/lr-range.json").read_text())
    assert printed["arm"] == "sgd,momentum=0.9"
    assert printed["lrs"][0] == 1e-7


def test_no_suggestion_is_exit_code_1(trimtab: Callable[..., Any]) -> None:
    found = trimtab("lr-range", "tabular", "--highest=1e-6", "--steps=20", "--out=out")
    assert found.code == 1
    assert "no suggestion: the loss fell by" in found.out
    assert json.loads(Path("out/lr-range.json").read_text())["suggestion"] is None
    assert "not more than noise" in Path("out/lr-range.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["lr-range", "tabuler"], "Did you mean 'tabular'?"),
        (["lr-range", "tabular", "--lowest=1", "--highest=0.1"], "rates must rise from above 0"),
        (["lr-range", "tabular", "--steps=3"], "steps must be a whole number, at least 10, got 3"),
        (["lr-range", "tabular", "--mode=log"], "unknown mode 'log'"),
        (["lr-range", "tabular", "--arm=nothing"], "unknown optimizer 'nothing'"),
        (["lr-range", "tabular", "--text=here"], "takes no text"),
        (["lr-range"], "WORKLOAD"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], text: str, refused: Callable[..., str]) -> None:
    assert text in refused(*arguments)


def test_an_interrupt_is_one_line(monkeypatch: pytest.MonkeyPatch, trimtab: Callable[..., Any]) -> None:
    def stop(*arguments: Any, **options: Any) -> float:
        raise KeyboardInterrupt

    monkeypatch.setattr(lr_range, "_step", stop)
    found = trimtab("lr-range", "tabular", "--out=out")
    assert found.code == 130
    assert found.err.splitlines()[-1] == "trimtab: interrupted: nothing is kept of a range test, run it again."
    assert not Path("out").exists()
