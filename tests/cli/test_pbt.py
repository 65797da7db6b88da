"""`pbt`: the members, what the best was trained with, JSON, a page; wrong use is one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SMALL = ("--members=4", "--interval=10", "--steps=30", "--workers=0")


def test_prints_members_and_schedule_and_writes_what_it_found(trimtab: Callable[..., Any]) -> None:
    found = trimtab("pbt", "digits-mlp", *SMALL, "--space=lr=1e-4:1e-1:log", "--space=beta1=0.5:0.95", "--out=out")
    assert found.code == 0
    written = json.loads(Path("out/population.json").read_text(), parse_constant=pytest.fail)
    best = written["best"]
    assert (written["kind"], written["workload"], written["steps"]) == ("population", "digits-mlp", 120)
    assert best["score"] == min(member["score"] for member in written["members"])
    assert "digits-mlp: 4 members, 120 steps in all" in found.out
    assert f"What member {best['member']}, the best, was trained with" in found.out
    assert f"{best['score']:.4g}" in found.out
    assert "log10 lr from each step on" in found.out
    assert "o beta1 from each step on" in found.out
    assert "population on digits-mlp: 0/120 steps 0/12 runs" in found.err
    assert "120/120 steps" in found.err
    page = Path("out/population.html").read_text()
    assert "Population based training on digits-mlp" in page
    assert "lr of the best member" in page
    assert "beta1 of the best member" in page
    assert "default-src 'none'" in page.replace("&#x27;", "'")


def test_goes_on_with_what_is_there_and_json_is_what_is_written(trimtab: Callable[..., Any]) -> None:
    trimtab("pbt", "digits-mlp", *SMALL, "--exploit=tournament", "--metric=accuracy", "--out=out")
    times = {path: path.stat().st_mtime_ns for path in Path("out/members").rglob("*.json")}
    found = trimtab("pbt", "digits-mlp", *SMALL, "--exploit=tournament", "--metric=accuracy", "--out=out", "--json")
    printed = json.loads(found.out, parse_constant=pytest.fail)
    assert {**printed, "kind": "population"} == json.loads(Path("out/population.json").read_text())
    assert printed["best"]["score"] == max(member["score"] for member in printed["members"])
    assert {path: path.stat().st_mtime_ns for path in Path("out/members").rglob("*.json")} == times
    other = trimtab("pbt", "digits-mlp", *SMALL, "--exploit=t-test", "--metric=accuracy", "--out=out")
    assert other.code == 2
    assert "exploit is 'tournament' there and 't-test' here" in other.err.splitlines()[-1]


def test_a_population_that_dies_is_exit_code_1(trimtab: Callable[..., Any]) -> None:
    found = trimtab("pbt", "digits-mlp", *SMALL, "--space=lr=1e30:1e34:log", "--arm=sgd,momentum=0,clip=0", "--out=out")
    assert found.code == 1
    assert "diverged" in found.out
    written = json.loads(Path("out/population.json").read_text(), parse_constant=pytest.fail)
    assert written["best"]["score"] is None
    assert "diverged" in Path("out/population.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["pbt", "digits-mpl"], "Did you mean 'digits-mlp'?"),
        (["pbt", "digits-mlp", "--space=lr"], "cannot read the space"),
        (["pbt", "digits-mlp", "--space=lr=1:0.1"], "low of a range should be below high"),
        (["pbt", "digits-mlp", "--space=steps=1:10"], "steps cannot change during a run"),
        (["pbt", "digits-mlp", "--members=1"], "members must be a whole number from 2 to 999, got 1"),
        (["pbt", "digits-mlp", "--steps=10", "--interval=20"], "interval must be a whole number from 1 to 10, got 20"),
        (["pbt", "digits-mlp", "--exploit=best"], "unknown exploit rule 'best'"),
        (["pbt", "digits-mlp", "--metric=acuracy"], "Did you mean 'accuracy'?"),
        (["pbt", "digits-mlp", "--arm=nothing"], "unknown optimizer 'nothing'"),
        (["pbt", "digits-mlp", "--text=here"], "takes no text"),
        (["pbt"], "WORKLOAD"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], text: str, refused: Callable[..., str]) -> None:
    assert text in refused(*arguments)
    assert not Path("runs").exists()


def test_an_interrupt_keeps_what_is_finished(monkeypatch: pytest.MonkeyPatch, trimtab: Callable[..., Any]) -> None:
    from trimtab.tune.population._members import Members

    finish, done = Members.finish, []

    def stop(self: Members, *arguments: Any) -> bool:
        done.append(finish(self, *arguments))
        if len(done) == 5:
            raise KeyboardInterrupt
        return done[-1]

    monkeypatch.setattr(Members, "finish", stop)
    found = trimtab("pbt", "digits-mlp", *SMALL, "--out=out")
    assert found.code == 130
    assert found.err.splitlines()[-1] == (
        "trimtab: interrupted: finished runs are kept in out, the same command goes on from there."
    )
    assert len(list(Path("out/members").glob("*/?????.json"))) == 5
    assert trimtab("pbt", "digits-mlp", *SMALL, "--out=out").code == 0
    assert len(done) == 12
