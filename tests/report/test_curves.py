from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from trimtab.record import Recorder
from trimtab.report.curves import Chart, curve_charts
from trimtab.report.subject import subjects


def charts_of(folders: list[Path], doctor: object) -> dict[str, Chart]:
    return {chart.signals[0]: chart for chart in curve_charts(subjects(folders, doctor))}  # type: ignore[arg-type]


def test_heads_are_drawn_as_the_worst_of_each_layer(tmp_path: Path, sample: SimpleNamespace) -> None:
    with Recorder(tmp_path / "run") as recorder:
        labels = ["a/head0", "a/head1", "b/head0"]
        recorder.log(0, "attention_max_logit", [1.0, 5.0, 2.0], labels=labels)
        recorder.log(0, "attention_entropy", [1.0, 0.5, 2.0], labels=labels)
    charts = charts_of([tmp_path / "run"], sample.FixedDoctor({}))
    largest = {line["name"]: line["y"] for line in charts["attention_max_logit"].spec["lines"]}
    smallest = {line["name"]: line["y"] for line in charts["attention_entropy"].spec["lines"]}
    assert largest == {"a": [5.0], "b": [2.0]}
    assert smallest == {"a": [0.5], "b": [2.0]}
    assert charts["attention_max_logit"].spec["log"]
    assert not charts["attention_entropy"].spec["log"]


def test_runs_lie_over_each_other_one_curve_each(tmp_path: Path, sample: SimpleNamespace) -> None:
    folders = [sample.write_run(tmp_path / name, unstable=name == "a", steps=50) for name in ("a", "b")]
    charts = charts_of(folders, sample.FixedDoctor({}))
    assert [line["name"] for line in charts["attention_max_logit"].spec["lines"]] == ["a", "b"]
    assert [(line["name"], line["dash"]) for line in charts["loss"].spec["lines"]] == [
        ("a", 0),
        ("a: evaluation", 1),
        ("b", 0),
        ("b: evaluation", 1),
    ]


def test_of_many_modules_those_of_findings_and_the_worst_are_shown(tmp_path: Path, sample: SimpleNamespace) -> None:
    names = [f"layer{index}" for index in range(40)]
    with Recorder(tmp_path / "run") as recorder:
        recorder.log(0, "activation_max", np.arange(1.0, 41.0), labels=names)
    sign = sample.finding(modules=["layer3"], evidence={"signal": "activation_max"})
    chart = charts_of([tmp_path / "run"], sample.FixedDoctor({"run": [sign]}))["activation_max"]
    shown = [line["name"] for line in chart.spec["lines"]]
    assert shown == ["layer3", *names[-6:]]
    assert "7 of 40" in chart.note


def test_a_finding_marks_the_chart_of_its_signal(tmp_path: Path, sample: SimpleNamespace) -> None:
    folder = sample.write_run(tmp_path / "run", steps=50)
    found = [sample.finding(first_step=10, last_step=30), sample.finding(evidence={"signal": "not-recorded"})]
    charts = charts_of([folder], sample.FixedDoctor({"run": found}))
    band = {
        "tag": "F1",
        "name": "attention-logit-growth",
        "severity": "critical",
        "from": 10,
        "to": 30,
        "threshold": 50.0,
    }
    assert charts["attention_max_logit"].spec["bands"] == [band]
    assert all(not chart.spec["bands"] for signal, chart in charts.items() if signal != "attention_max_logit")


def test_values_that_are_not_finite_are_gaps_with_marks(tmp_path: Path, sample: SimpleNamespace) -> None:
    with Recorder(tmp_path / "run") as recorder:
        for step, value in enumerate([2.0, math.nan, math.inf, 1.0]):
            recorder.log(step, "loss", value)
    chart = charts_of([tmp_path / "run"], sample.FixedDoctor({}))["loss"]
    assert chart.spec["lines"][0]["y"] == [2.0, None, None, 1.0]
    assert chart.spec["lines"][0]["marks"] == [[1, "nan"], [2, "+inf"]]
    assert "2 values not finite" in chart.note
    assert "lowest 1, highest 2" in chart.summary


def test_a_signal_that_only_the_user_knows_gets_a_chart(tmp_path: Path, sample: SimpleNamespace) -> None:
    with Recorder(tmp_path / "run") as recorder:
        recorder.log(0, "my signal", 1.0)
    chart = charts_of([tmp_path / "run"], sample.FixedDoctor({}))["my signal"]
    assert (chart.title, chart.group) == ("my signal", "Other signals")
