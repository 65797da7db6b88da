"""The demo's steps in small; `make demo` runs it in full."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trimtab.cli import demo
from trimtab.diagnose.doctor import Diagnosis, Doctor
from trimtab.diagnose.finding import Finding


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs too short to go wrong, and a doctor who finds the fault all the same in the watched run."""
    monkeypatch.setattr(demo, "_FULL", demo._Size(lr=0.1, steps=3, batch_size=8, seeds=1))
    remedies = ("qk-norm", "sigma-reparam", "lower-lr")
    finding = Finding(
        "attention-logit-growth",
        "critical",
        0,
        2,
        ("blocks.0.attention/head0",),
        {"signal": "loss"},
        "It grew.",
        remedies,
    )
    monkeypatch.setattr(Doctor, "examine", lambda self, run: Diagnosis("run", (finding,)))


@pytest.mark.usefixtures("small")
def test_demo_goes_through_all_five_steps_and_resumes(trimtab: Callable[..., Any]) -> None:
    found = trimtab("demo")
    assert found.code == 0, found
    words = " ".join(found.out.split())
    for text in (
        "1. Train lm-small",
        "attention-logit-growth [critical]",
        "3. Try its remedies, qk-norm",
        "4. Before and after",
    ):
        assert text in words
    assert "no evidence (n=1)" in words
    folder = Path("trimtab-demo")
    assert "attention-logit-growth" in (folder / "report.html").read_text()
    # The watched run is the first arm on its first seed: four arms, four runs, none twice.
    jobs = {path: path.stat().st_mtime_ns for path in (folder / "jobs").glob("*.json")}
    assert len(jobs) == 4
    assert trimtab("demo").code == 0
    assert {path: path.stat().st_mtime_ns for path in (folder / "jobs").glob("*.json")} == jobs


def test_demo_takes_no_folder_that_is_not_its_own(refused: Callable[..., str]) -> None:
    Path("mine").mkdir()
    Path("mine/thesis.tex").write_text("years of work")
    assert "not a demo of trimtab" in refused("demo", "--out", "mine")
    assert [path.name for path in Path("mine").iterdir()] == ["thesis.tex"]


@pytest.mark.usefixtures("small")
def test_demo_fails_openly_if_the_doctor_finds_nothing(
    monkeypatch: pytest.MonkeyPatch, trimtab: Callable[..., Any]
) -> None:
    monkeypatch.setattr(Doctor, "examine", lambda self, run: Diagnosis("run", ()))
    found = trimtab("demo", "--workers=1")
    assert found.code == 1
    assert found.err.splitlines()[-1].startswith("trimtab: the doctor did not name attention-logit-growth")
