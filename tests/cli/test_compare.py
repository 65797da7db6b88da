"""`compare`, `sweep`, `reproduce`: tables for people, JSON for programs, reports."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trimtab.card import Card, Experiment, Paper


def test_compare_prints_verdicts_writes_results_and_a_report(trimtab: Callable[..., Any]) -> None:
    arms = ["--arm", "adamw,lr=1e-5", "--arm", "adamw,lr=0.01"]
    common = ["compare", "digits-mlp", *arms, "--seeds=2", "--steps=15", "--workers=2", "--out=out"]
    found = trimtab(*common, "--report=report.html")
    assert found.code == 0
    assert "better (n=2)" in " ".join(found.out.split())
    assert "4/4 runs" in found.err
    assert "adamw,lr=0.01" in Path("report.html").read_text()
    again = trimtab(*common, "--json")
    written = json.loads(Path("out/comparison.json").read_text())
    assert {"kind": "comparison", **json.loads(again.out, parse_constant=pytest.fail)} == written


def test_compare_by_accuracy(trimtab: Callable[..., Any]) -> None:
    arms = ["--arm", "lr=1e-6", "--arm", "lr=0.01"]
    found = trimtab("compare", "tabular", *arms, "--seeds=1", "--steps=20", "--workers=1", "--metric=accuracy")
    assert "final accuracy (higher is better), 1 paired seed" in found.out
    assert "[unbounded] │ no evidence (n=1)" in " ".join(found.out.split())


def test_sweep_prints_curves_and_sensitivity(trimtab: Callable[..., Any]) -> None:
    common = ["sweep", "tabular", "--lr=1e-3:1e-1", "--points=3", "--with=lower-lr", "--steps=10", "--out=out"]
    found = trimtab(*common, "--report=report.html")
    assert found.code == 0
    assert "o without remedy   + lower-lr" in found.out
    assert "Learning-rate sensitivity over 0.001 to 0.1" in found.out
    assert "without remedy" in Path("report.html").read_text()
    again = json.loads(trimtab(*common, "--json").out, parse_constant=pytest.fail)
    assert again["lrs"] == [0.001, 0.01, 0.1]
    assert f"{again['curves'][1]['S']:.4g}" in found.out


def test_reproduce_prints_claim_and_outcome(monkeypatch: pytest.MonkeyPatch, trimtab: Callable[..., Any]) -> None:
    experiment = Experiment(
        "tabular", "lr=1e-6,steps=10", "lr=0.01,steps=10", mechanism="grad_norm", outcome="better, n=5"
    )
    card = Card(
        "made-up", "losses", "s", Paper("A paper", 2001), "x", "a bold claim", "loss", "a:b", experiments=(experiment,)
    )
    monkeypatch.setattr("trimtab.catalogue.method", lambda name: card)
    found = trimtab("reproduce", "made-up", "--seeds=2", "--workers=1", "--out=out")
    assert found.code == 0
    for text in ("A paper (2001", "a bold claim", "ours: loss", "mechanism: grad_norm", "on the card: better, n=5"):
        assert text in found.out
    data = json.loads(Path("out/reproduction.json").read_text())
    assert data["results"][0]["verdict"]["n"] == 2
