"""`tune`: a table with reasons for people, JSON for programs, a page to look at, one line for wrong use."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trimtab.workloads import parse_arm, workload

pytest.importorskip("optuna")

SPACE = ("--space=lr=1e-3:1e3:log", "--space=weight_decay=0:0.3")


def test_a_table_with_reasons_and_the_files(trimtab: Callable[..., Any]) -> None:
    found = trimtab("tune", "tabular", *SPACE, "--trials=6", "--steps=40", "--workers=1", "--out=out")
    assert found.code == 0, found.err
    written = json.loads(Path("out/tune.json").read_text(), parse_constant=pytest.fail)
    assert written["kind"] == "tuning"
    best = written["best"]
    assert f"best: trial {best['number']}, loss {best['value']:.5g}" in found.out
    assert f"arm: {best['arm']}" in found.out
    parse_arm(best["arm"], workload("tabular").defaults)
    assert "tabular: best of 6 trials by loss (" in found.out
    assert written["findings"], "the space reaches rates that destroy the run"
    for name, row in written["findings"].items():
        assert name in found.out
        assert row["count"] == len(row["trials"])
    page = Path("out/tune.html").read_text()
    assert "Tuning of tabular" in page
    assert "Why trials went wrong" in page
    assert "<svg" in page
    more = trimtab("tune", "tabular", *SPACE, "--trials=7", "--steps=40", "--workers=1", "--out=out", "--json")
    printed = json.loads(more.out, parse_constant=pytest.fail)
    assert printed["trials"][:6] == written["trials"]
    assert len(printed["trials"]) == 7
    assert printed == json.loads(Path("out/tune.json").read_text())


def test_a_script_with_its_arguments(trimtab: Callable[..., Any]) -> None:
    Path("train.py").write_text(
        "import sys, trimtab.trial as t\nx = float(sys.argv[2])\nt.result((x - 0.5) ** 2 + t.suggest('y', 0.0, 1.0))\n"
    )
    found = trimtab("tune", "train.py", "--space=x=0:1", "--trials=4", "--workers=2", "--", "--x", "{x}")
    assert found.code == 0, found.err
    written = json.loads(Path("runs/tune-train/tune.json").read_text())
    assert written["plan"]["arguments"] == ["--x", "{x}"]
    best = written["best"]["values"]
    assert f"values: x={best['x']:.4g}, y={best['y']:.4g}" in found.out
    assert written["best"]["value"] == (best["x"] - 0.5) ** 2 + best["y"]
    assert "tuning train.py: " in found.err


def test_no_value_is_exit_code_1(trimtab: Callable[..., Any]) -> None:
    Path("bad.py").write_text("raise SystemExit('no data')\n")
    found = trimtab("tune", "bad.py", "--trials=2", "--workers=1", "--out=out")
    assert (found.code, found.out) == (1, "")
    line = "trimtab: none of 2 trials in out gave a value: trial 0: exit code 1: no data"
    assert found.err.splitlines()[-1] == line
    assert json.loads(Path("out/tune.json").read_text())["counts"] == {"failed": 2}
    assert "no data" in Path("out/tune.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["tune", "tabular"], "give the space: --space NAME=LOW:HIGH"),
        (["tune", "tabular", "--space=lr"], "cannot read the space 'lr'"),
        (["tune", "tabular", "--space=lr=1:1"], "should be below high"),
        (["tune", "tabular", "--space=lr=0:1:log"], "logarithmic range should be above 0"),
        (["tune", "tabular", "--space=lrr=1:2"], "Did you mean 'lr'?"),
        (["tune", "tabular", "--space=lr=1:2", "--metric=f1"], "unknown metric of tabular 'f1'"),
        (["tune", "tabular", "--space=lr=1:2", "--sampler=grid"], "unknown sampler 'grid'"),
        (["tune", "tabular", "--space=lr=1:2", "--trials=0"], "trials should be a whole number"),
        (["tune", "tabular", "--space=lr=1:2", "--", "x"], "takes no arguments"),
        (["tune", "tabuler", "--space=lr=1:2"], "Did you mean 'tabular'?"),
        (["tune", "nothing.py"], "there is no script 'nothing.py'"),
        (["tune"], "WORKLOAD|SCRIPT"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], text: str, refused: Callable[..., str]) -> None:
    assert text in refused(*arguments)
    assert not Path("runs").exists()


def test_an_interrupt_says_what_is_kept(monkeypatch: pytest.MonkeyPatch, trimtab: Callable[..., Any]) -> None:
    from trimtab.tune.search import engine

    def stop(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(engine, "fill_slot", stop)
    found = trimtab("tune", "tabular", *SPACE, "--workers=1", "--out=out")
    assert found.code == 130
    assert found.err.splitlines()[-1] == (
        "trimtab: interrupted: trials that ended are kept in out, the same command goes on from there."
    )
