"""Tuning functions and workloads: reproducible, never dropping what diverged, with the doctor's reasons."""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from trimtab.errors import RunFailedError, UsageError
from trimtab.record import Run
from trimtab.tune import Tuning, tune
from trimtab.tune.search.workload_trial import arm_text
from trimtab.workloads import Settings, parse_arm, workload

pytest.importorskip("optuna")

SPACE = {"x": "-2:2", "y": "1e-3:10:log", "kind": "a,b,c"}


def cost(trial: Any) -> float:
    return (trial.values["x"] - 1) ** 2 + abs(math.log(trial.values["y"])) + (trial.values["kind"] == "a")


def results(found: Tuning) -> list[tuple[Any, ...]]:
    return [(trial.number, trial.status, trial.value, trial.values) for trial in found.trials]


@pytest.mark.parametrize("sampler", ["tpe", "random", "qmc"])
def test_one_worker_gives_the_same_again_also_in_parts(tmp_path: Path, sampler: str) -> None:
    whole = tune(cost, SPACE, trials=13, folder=tmp_path / "whole", sampler=sampler, seed=3)
    tune(cost, SPACE, trials=5, folder=tmp_path / "parts", sampler=sampler, seed=3)
    parts = tune(cost, SPACE, trials=13, folder=tmp_path / "parts", sampler=sampler, seed=3)
    assert results(whole) == results(parts)
    assert [trial.value for trial in whole.trials] == [
        (t.values["x"] - 1) ** 2 + abs(math.log(t.values["y"])) + (t.values["kind"] == "a") for t in whole.trials
    ]
    other = tune(cost, SPACE, trials=5, folder=tmp_path / "other", sampler=sampler, seed=4)
    assert results(other) != results(whole)[:5]


def test_gp_draws_within_the_space(tmp_path: Path) -> None:
    found = tune(cost, SPACE, trials=11, folder=tmp_path, sampler="gp")
    assert all(-2 <= trial.values["x"] <= 2 and trial.values["kind"] in "abc" for trial in found.trials)


def test_maximize(tmp_path: Path) -> None:
    found = tune(lambda trial: -cost(trial), SPACE, trials=12, folder=tmp_path, maximize=True)
    assert found.best is not None
    assert found.best.value == max(trial.value for trial in found.trials)
    assert [trial.value for trial in found.ranking] == sorted((t.value for t in found.trials), reverse=True)


def test_what_is_written_is_what_is_returned(tmp_path: Path) -> None:
    found = tune(cost, SPACE, trials=12, folder=tmp_path)
    written = json.loads((tmp_path / "tune.json").read_text(), parse_constant=pytest.fail)
    assert written["kind"] == "tuning"
    assert written["best"]["number"] == found.best.number
    assert len(written["trials"]) == 12
    assert set(written["importance"]) <= set(SPACE)
    assert math.isclose(sum(written["importance"].values()), 1, rel_tol=1e-6)


def test_a_trial_that_raises_is_kept_with_its_reason(tmp_path: Path) -> None:
    def objective(trial: Any) -> float:
        if trial.number == 1:
            raise ZeroDivisionError("no\nsuch thing")
        return cost(trial)

    found = tune(objective, SPACE, trials=3, folder=tmp_path)
    assert found.counts == {"finished": 2, "failed": 1}
    assert (found.trials[1].value, found.trials[1].reason) == (None, "ZeroDivisionError: no such thing")


def test_no_value_at_all_is_a_failed_run(tmp_path: Path) -> None:
    with pytest.raises(RunFailedError, match=r"none of 3 trials in .* gave a value: trial 0: its metric is not finite"):
        tune(lambda trial: math.nan, SPACE, trials=3, folder=tmp_path)


def test_reports_that_diverge_stop_the_trial_and_count_as_its_first(tmp_path: Path) -> None:
    last = {}

    def objective(trial: Any) -> float:
        loss = 2.0
        for step in range(100):
            last[trial.number] = step
            trial.report(loss, step)
            loss *= 1.2 if trial.number % 2 else 0.98
        return loss

    found = tune(objective, {"x": "0:1"}, trials=4, folder=tmp_path)
    assert [trial.status for trial in found.trials] == ["finished", "pruned", "finished", "pruned"]
    assert [trial.value for trial in found.trials[1::2]] == [2.0, 2.0]
    assert last[0] == 99
    assert last[1] < 60
    assert "loss-divergence" in [entry["name"] for entry in found.trials[1].findings]
    assert found.trials[1].reason.startswith("loss-divergence: The loss began at 2")
    with Run(tmp_path / "runs/trial-1") as run:
        assert run.status == "diverged"
        assert run.events("pruned")
    unpruned = tune(objective, {"x": "0:1"}, trials=2, folder=tmp_path / "unpruned", prune=False)
    assert last[1] == 99
    assert unpruned.trials[1].status == "finished"
    assert "loss-divergence" in unpruned.findings


def test_a_report_that_is_not_finite_ends_the_trial(tmp_path: Path) -> None:
    def objective(trial: Any) -> float:
        trial.report(3.0, 0)
        trial.report(math.nan, 1)
        raise AssertionError("it went on")

    (trial,) = tune(objective, {"x": "0:1"}, trials=1, folder=tmp_path).trials
    assert (trial.status, trial.value) == ("pruned", 3.0)
    assert trial.findings[0]["name"] == "non-finite"


def test_the_median_rule_stops_but_does_not_rank(tmp_path: Path) -> None:
    def objective(trial: Any) -> float:
        for step in range(5):
            trial.report(1.0 if trial.number < 6 else 5.0, step)
        return 1.0 if trial.number < 6 else 0.0

    found = tune(objective, {"x": "0:1"}, trials=8, folder=tmp_path, median=True)
    assert [trial.status for trial in found.trials[6:]] == ["pruned", "pruned"]
    assert not any(trial.ranked for trial in found.trials[6:])
    assert found.trials[6].value == 5.0
    assert "behind the median" in found.trials[6].reason
    assert found.best.value == 1.0


def test_a_function_may_ask_for_its_values(tmp_path: Path) -> None:
    def objective(trial: Any) -> float:
        x = trial.suggest("x", -1.0, 1.0)
        assert trial.suggest("x", -1.0, 1.0) == x
        layers = trial.suggest("layers", [1, 2, 3])
        assert 0.25 <= trial.suggest("declared", 0.0, 100.0) <= 0.5, "the space counts"
        return x**2 + layers

    found = tune(objective, {"declared": "0.25:0.5"}, trials=12, folder=tmp_path)
    assert set(found.trials[0].values) == {"x", "layers", "declared"}
    assert {trial.values["layers"] for trial in found.trials} <= {1, 2, 3}


def test_workload_trials_are_recorded_runs_with_reasons(tmp_path: Path) -> None:
    space = ["lr=1e-3:1e3:log", "optimizer=adamw,sgd", "momentum=0:0.95"]
    found = tune("tabular", space, trials=6, folder=tmp_path, steps=40)
    job = workload("tabular")
    assert {trial.status for trial in found.trials} == {"finished", "pruned"}
    for trial in found.trials:
        with Run(tmp_path / trial.folder) as run:
            settings = parse_arm(trial.arm, job.defaults).replace(steps=40)
            assert run.meta["config"] == settings.model_dump(mode="json")
            initial = run.meta["initial_loss"]
        assert ("momentum" in trial.values) == (trial.values["optimizer"] == "sgd")
        assert trial.value <= initial
        if trial.status == "pruned":
            assert trial.value == initial
            assert trial.reason
            assert {entry["name"] for entry in trial.findings} & {"non-finite", "loss-divergence"}
    assert found.best.status == "finished"
    assert found.best.value < 0.9 * initial


def test_worker_processes_share_the_trials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "shared_cost.py").write_text(
        "import os, signal, pathlib\n"
        "def cost(trial):\n"
        "    mark = pathlib.Path(os.environ['MARK'])\n"
        "    if trial.number == 2 and not mark.exists():\n"
        "        mark.touch()\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return trial.values['x'] ** 2\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("MARK", str(tmp_path / "mark"))
    notes = []
    found = tune(
        "shared_cost:cost", {"x": "-1:1"}, trials=6, folder=tmp_path / "out", workers=2,
        progress=lambda progress: notes.append(progress.note) if progress.note else None,
    )  # fmt: skip
    assert [trial.number for trial in found.trials] == list(range(6))
    assert found.counts == {"finished": 6}
    assert [trial.attempt for trial in found.trials] == [1, 1, 2, 1, 1, 1]
    assert any("SIGKILL" in note and "run again" in note for note in notes)
    assert all(trial.value == trial.values["x"] ** 2 for trial in found.trials)
    assert list((tmp_path / "out" / "workers").iterdir()) == [], "what workers needed goes with them"
    sys.modules.pop("shared_cost", None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"space": {}}, "the space is empty"),
        ({"space": ["lrr=1:2"]}, "Did you mean 'lr'?"),
        ({"space": ["lr=0:1"]}, "lr should be greater than 0, got '0.0'"),
        ({"space": ["beta1=0:0.9"], "arm": "sgd"}, "beta1 has no effect with sgd"),
        ({"space": ["optimizer=adamw,adamv"]}, "unknown optimizer 'adamv'"),
        ({"space": ["optimizer=adamw,sgd", "momentum=0:2"]}, "momentum should be less than 1"),
        ({"space": ["batch_size=16:100000:int"]}, "exceeds the"),
        ({"space": ["seed=0:9:int"]}, "seed cannot be in the space"),
        ({"space": ["remedies=a,b"]}, "choose remedies by with=none,NAME"),
        ({"space": ["with=none,qk-nrom"]}, "qk-norm"),
        ({"space": ["lr=1e-3:1"], "metric": "acuracy"}, "Did you mean 'accuracy'?"),
        ({"space": ["lr=1e-3:1"], "sampler": "tpee"}, "Did you mean 'tpe'?"),
        ({"space": ["lr=1e-3:1"], "trials": 0}, "trials should be a whole number"),
        ({"space": ["lr=1e-3:1"], "workers": 0}, "workers must be at least 1"),
        ({"space": ["lr=1e-3:1"], "seed": -1}, "seed should be"),
        ({"subject": "tabuler", "space": ["lr=1e-3:1"]}, "Did you mean 'tabular'?"),
        ({"subject": "nowhere:f", "space": ["lr=1e-3:1"]}, "cannot import the objective"),
        ({"subject": "no-such.py", "arguments": [], "space": ["lr=1e-3:1"]}, "there is no script"),
        ({"subject": cost, "steps": 3, "space": ["x=0:1"]}, "steps belongs to workloads"),
        ({"subject": cost, "steps": 0, "space": ["x=0:1"]}, "steps belongs to workloads"),
        ({"subject": cost, "pattern": "x=(.)", "space": ["x=0:1"]}, "pattern belongs to scripts"),
        ({"space": ["lr=1e-3:1"], "pattern": "x=(.)"}, "pattern belongs to scripts"),
        ({"space": ["lr=1e-3:1"], "metric": "accuracy"}, "accuracy should be maximized"),
        ({"space": ["lr=1e-3:1"], "maximize": True}, "loss should not be maximized"),
        ({"space": ["batch_size=8:16"]}, "batch_size should be a valid integer"),
        ({"subject": lambda trial: 0.0, "space": ["x=0:1"], "workers": 2}, "cannot import the objective"),
    ],
)
def test_wrong_use_is_one_line_and_leaves_nothing(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    given = {"subject": "tabular", "trials": 2, **arguments}
    with pytest.raises(UsageError, match=re.escape(message)) as caught:
        tune(given.pop("subject"), given.pop("space"), folder=tmp_path / "out", **given)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_another_tuning_in_the_folder_is_refused(tmp_path: Path) -> None:
    tune(cost, SPACE, trials=1, folder=tmp_path)
    with pytest.raises(UsageError, match="holds a tuning with another sampler"):
        tune(cost, SPACE, trials=1, folder=tmp_path, sampler="random")


def test_an_interrupt_keeps_what_has_ended(tmp_path: Path) -> None:
    def objective(trial: Any) -> float:
        if trial.number == 2 and not (tmp_path / "mark").exists():
            (tmp_path / "mark").touch()
            raise KeyboardInterrupt
        return cost(trial)

    with pytest.raises(KeyboardInterrupt):
        tune(objective, SPACE, trials=4, folder=tmp_path / "out", seed=3)
    found = tune(objective, SPACE, trials=4, folder=tmp_path / "out", seed=3)
    assert [trial.attempt for trial in found.trials] == [1, 1, 1, 1]
    assert results(found) == results(tune(objective, SPACE, trials=4, folder=tmp_path / "whole", seed=3))


@pytest.mark.parametrize(
    "arm",
    [
        "adamw,lr=0.02345,weight_decay=0.1,clip=1.0",
        "sgd,lr=0.5,momentum=0.3,batch_size=17",
        "trimtab-adamw,eps=1e-06,state=bf16,beta1=0.8",
        "lion,lr=0.0003,warmup=0.2",
        "adamw,schedule=wsd,schedule.decay=0.3",
        "adamw,spikes=0.01,spike_scale=5.0",
        "adamw",
    ],
)
def test_arm_text_reads_back(arm: str) -> None:
    defaults: Settings = workload("tabular").defaults
    settings = parse_arm(arm, defaults)
    assert parse_arm(arm_text(settings, defaults), defaults) == settings
    longer = settings.replace(steps=77)
    assert parse_arm(arm_text(longer, defaults, steps=True), defaults) == longer
