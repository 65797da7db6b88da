"""Studies: functions in place of workloads, options in place of settings."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import pytest

from trimtab.card import Card, Experiment, Paper
from trimtab.compare import compare_study, reproduce, study_function, study_options
from trimtab.errors import RunFailedError, UsageError
from trimtab.studies.preferences import pairs
from trimtab.studies.running import run

STUDY = "trimtab.studies.preferences:pairs"
TINY = "steps=3"


def _made_up(monkeypatch: pytest.MonkeyPatch, **functions: object) -> None:
    module = types.ModuleType("made_up_study")
    vars(module).update(functions)
    monkeypatch.setitem(sys.modules, "made_up_study", module)


def test_arms_are_paired_over_seeds(tmp_path: Path) -> None:
    arms = (f"loss=dpo,{TINY}", f"loss=iterative-rpo,{TINY}")
    found = compare_study(STUDY, arms, folder=tmp_path, metric="chosen_log_prob", higher_is_better=True, seeds=2)
    assert found.seeds == (0, 1)
    assert [len(runs) for runs in found.values] == [2, 2]
    baseline, treated = ([metrics["chosen_log_prob"] for metrics in runs] for runs in found.values)
    # Each arm and seed has the values of its own options.
    for values, loss in ((baseline, "dpo"), (treated, "iterative-rpo")):
        own = [pairs(seed, loss=loss, steps=3)["chosen_log_prob"] for seed in (0, 1)]
        assert values == pytest.approx(own, rel=1e-4)
    pair = found.pairs[arms[1]]
    assert pair.n == 2
    assert pair.mean == pytest.approx((treated[0] - baseline[0] + treated[1] - baseline[1]) / 2)
    data = json.loads((tmp_path / "study.json").read_text(), parse_constant=pytest.fail)
    assert [arm["label"] for arm in data["arms"]] == list(arms)
    assert data["pairs"][0]["mean"] == pair.mean
    assert {"cpu_seconds", "chosen_log_prob"} <= set(data["arms"][0]["runs"][0])
    # Nothing is run again.
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "jobs").glob("*.json")}
    assert len(times) == 4
    again = compare_study(STUDY, arms, folder=tmp_path, metric="chosen_log_prob", higher_is_better=True, seeds=2)
    assert again == found
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "jobs").glob("*.json")} == times


def test_a_card_reproduces_its_study(tmp_path: Path) -> None:
    experiment = Experiment(
        STUDY, f"loss=dpo,{TINY}", f"loss=ipo,{TINY}", "chosen_log_prob", mechanism="rejected_log_prob", seeds=3
    )
    card = Card(
        "made-up", "losses", "s", Paper("A paper", 2001), "x", "a claim", "loss", "a:b", experiments=(experiment,)
    )
    [found] = reproduce(card, folder=tmp_path, seeds=1, workers=1)
    assert found.verdict.n == 1
    assert found.verdict.verdict == "no evidence"
    assert found.mechanism is not None
    treated, baseline = (found.comparison.values[place][0]["rejected_log_prob"] for place in (1, 0))
    assert found.mechanism.mean == pytest.approx(treated - baseline)
    assert json.loads((tmp_path / "reproduction.json").read_text())["results"][0]["comparison"]["study"] == STUDY


def test_options_are_read_by_the_functions_signature(monkeypatch: pytest.MonkeyPatch) -> None:
    def study(seed: int, *, loss: str = "a", weight: float = 1.0, deep: bool = False) -> dict[str, float]:
        return {}

    _made_up(monkeypatch, study=study)
    path = "made_up_study:study"
    assert study_options(path, "") == {}
    assert study_options(path, "weight=2, deep=true,loss=b") == {"weight": 2.0, "deep": True, "loss": "b"}
    for text, message in (("seed=3", "seed"), ("wieght=2", "weight"), ("deep", "NAME=VALUE"), ("weight=x", "float")):
        with pytest.raises(UsageError, match=message):
            study_options(path, text)


def test_what_is_no_study_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _made_up(monkeypatch, constant=3, seedless=lambda: {"x": 1.0})
    made_up = [f"made_up_study:{name}" for name in ("constant", "seedless", "missing")]
    for path in (*made_up, "no_such_module:x", "", ":x", ".x:y"):
        with pytest.raises(UsageError, match="study"):
            study_function(path)
    for arm in ("", "loss=dpo"):  # dpo is the default
        with pytest.raises(UsageError, match="two different ones"):
            compare_study(STUDY, ("", arm), folder=tmp_path, metric="x")
    with pytest.raises(UsageError, match="metric"):
        compare_study(STUDY, (f"loss=dpo,{TINY}", f"loss=ipo,{TINY}"), folder=tmp_path, metric="nothing", seeds=1)


def test_a_run_is_seeded_and_its_metrics_are_finite(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import torch

    def draw(seed: int) -> dict[str, float]:
        return {"drawn": float(torch.rand(()))}

    def diverge(seed: int) -> dict[str, float]:
        return {"loss": float("nan")}

    _made_up(monkeypatch, draw=draw, diverge=diverge)

    def call(name: str, seed: int) -> dict[str, float]:
        arguments = {"study": f"made_up_study:{name}", "seed": seed, "options": {}}
        return run(arguments, tmp_path, lambda step, loss: None)

    before = torch.get_rng_state()
    assert call("draw", 1)["drawn"] == call("draw", 1)["drawn"] != call("draw", 2)["drawn"]
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(RunFailedError, match="worst finite value"):
        call("diverge", 0)
