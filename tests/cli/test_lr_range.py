"""`lr-range`: a table and a suggestion for people, JSON for programs, a page to look at."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


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
        (["lr-range", "tabular", "--seeds=0"], "takes 1 to 1000 seeds, got 0"),
        (["lr-range", "tabular", "--workers=0"], "workers must be at least 1, got 0"),
        (["lr-range", "tabular", "--arm=batch_size=1000000"], "exceeds the"),
        (["lr-range"], "WORKLOAD"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], text: str, refused: Callable[..., str]) -> None:
    assert text in refused(*arguments)


def test_an_interrupt_is_one_line(monkeypatch: pytest.MonkeyPatch, trimtab: Callable[..., Any]) -> None:
    def stop(*arguments: Any, **options: Any) -> list[dict[str, Any]]:
        raise KeyboardInterrupt

    monkeypatch.setattr("trimtab.tune.lr.workload_range.run_jobs", stop)
    found = trimtab("lr-range", "tabular", "--out=out")
    assert found.code == 130
    assert found.err.splitlines()[-1] == (
        "trimtab: interrupted: finished runs are kept in out, the same command goes on from there."
    )


def test_several_seeds_give_their_median_and_are_not_run_again(trimtab: Callable[..., Any]) -> None:
    found = trimtab("lr-range", "tabular", "--steps=60", "--seeds=3", "--out=out")
    assert found.code == 0
    written = json.loads(Path("out/lr-range.json").read_text(), parse_constant=pytest.fail)
    each = sorted(test["suggestion"] for test in written["tests"])
    assert [test["seed"] for test in written["tests"]] == [0, 1, 2]
    assert written["suggestion"] == each[1]
    assert written["suggestion_range"] == [each[0], each[2]]
    assert written["losses"] == written["tests"][written["shown_seed"]]["losses"]
    assert f"median of 3 seeds, {each[0]:.3g} to {each[2]:.3g}" in found.out
    assert "Each seed" in Path("out/lr-range.html").read_text()
    jobs = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in Path("out/jobs").glob("*.json")}
    assert len(jobs) == 3
    trimtab("lr-range", "tabular", "--steps=60", "--seeds=4", "--out=out")
    after = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in Path("out/jobs").glob("*.json")}
    assert len(after) == 4
    assert {path: after[path] for path in jobs} == jobs


def test_a_file_of_something_else_is_not_replaced(trimtab: Callable[..., Any]) -> None:
    Path("out").mkdir()
    Path("out/lr-range.json").write_text("{}")
    found = trimtab("lr-range", "tabular", "--steps=10", "--out=out")
    assert found.code == 2
    assert "is not a lr-range of trimtab" in found.err.splitlines()[-1]
    assert Path("out/lr-range.json").read_text() == "{}"
