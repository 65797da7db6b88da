"""`train`, `doctor` and `report` on one run after the other."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trimtab.record import Recorder, Run
from trimtab.workloads import train, workload


def test_train_records_what_it_was_told(trimtab: Callable[..., Any]) -> None:
    options = ["--lr=0.02", "--steps=12", "--batch-size=32", "--weight-decay=0.1", "--clip=0.5", "--warmup=0.2"]
    options += ["--schedule=constant", "--seed=3", "--with=lower-lr", "--out=run"]
    found = trimtab("train", "digits-mlp", *options)
    assert found.code == 0
    job = workload("digits-mlp")
    settings = job.defaults.replace(
        lr=0.02, steps=12, batch_size=32, weight_decay=0.1, clip=0.5, warmup=0.2, schedule="constant", seed=3
    ).replace(remedies=("lower-lr",))
    with Run("run") as run:
        assert run.meta["config"] == settings.model_dump(mode="json")
        assert run.status == "finished"
    loss = re.search(r"loss ([\d.]+),", found.out)
    assert loss is not None
    assert float(loss.group(1)) == pytest.approx(train(job, settings).loss, abs=6e-5)
    assert "CPU ms per step; recorded in run" in found.out.replace("12 steps, ", "")


def test_runs_get_folders_of_their_own(trimtab: Callable[..., Any]) -> None:
    for number in (1, 2):
        assert f"recorded in runs/tabular-{number}\n" in trimtab("train", "tabular", "--steps=2").out


def test_a_run_is_not_overwritten(trimtab: Callable[..., Any], refused: Callable[..., str]) -> None:
    trimtab("train", "tabular", "--steps=2", "--out=run")
    assert "already holds a run" in refused("train", "tabular", "--steps=2", "--out=run")


def test_resume_goes_on_and_refuses_other_settings(trimtab: Callable[..., Any], refused: Callable[..., str]) -> None:
    first = trimtab("train", "tabular", "--steps=4", "--checkpoint-every=2", "--out=run").out
    again = trimtab("train", "tabular", "--steps=4", "--out=run", "--resume").out
    assert first.split("steps")[0] == again.split("steps")[0]
    assert "other settings" in refused("train", "tabular", "--steps=5", "--out=run", "--resume")


def test_a_run_that_diverges_exits_with_1(trimtab: Callable[..., Any]) -> None:
    options = ["--optimizer=sgd", "--lr=1e30", "--clip=0", "--warmup=0", "--steps=20", "--out=run"]
    found = trimtab("train", "digits-mlp", *options)
    assert found.code == 1
    assert "diverged after" in found.out
    assert "trimtab doctor run" in found.out
    assert trimtab("doctor", "run").code == 1


def _record(folder: str, losses: list[float]) -> None:
    with Recorder(folder) as recorder:
        for step, loss in enumerate(losses):
            recorder.log(step, "loss", loss)


def test_doctor_exit_codes_and_json(trimtab: Callable[..., Any]) -> None:
    _record("healthy", [2.0 * math.exp(-step / 50) + 0.1 for step in range(200)])
    _record("sick", [2.0] * 50 + [math.nan] * 10)
    healthy, sick = trimtab("doctor", "healthy"), trimtab("doctor", "sick")
    assert (healthy.code, sick.code) == (0, 1)
    assert "non-finite" in sick.out
    data = json.loads(trimtab("doctor", "sick", "--json").out, parse_constant=pytest.fail)
    assert data["run"] == "sick"
    assert data["findings"][0]["name"] == "non-finite"


def test_notes_alone_are_no_fault(monkeypatch: pytest.MonkeyPatch, trimtab: Callable[..., Any]) -> None:
    from trimtab.diagnose.doctor import Diagnosis
    from trimtab.diagnose.finding import Finding

    note = Finding("lr-too-low", "info", 0, 10, (), {"signal": "loss"}, "The loss still falls.")
    monkeypatch.setattr("trimtab.diagnose.doctor.Doctor.examine", lambda *_: Diagnosis("run", (note,)))
    found = trimtab("doctor", "run")
    assert found.code == 0
    assert "lr-too-low" in found.out


def test_report_writes_one_file(trimtab: Callable[..., Any]) -> None:
    _record("sick", [2.0] * 50 + [math.nan] * 10)
    found = trimtab("report", "sick", "-o", "report.html", "--title", "A title")
    assert (found.code, found.out) == (0, "report: report.html\n")
    page = Path("report.html").read_text()
    assert "A title" in page
    assert "non-finite" in page


def test_train_with_an_optimizer_of_the_catalogue(trimtab: Callable[..., Any], refused: Callable[..., str]) -> None:
    options = ["--optimizer=trimtab-adamw", "--set=state=bf16", "--set", "beta2=0.9", "--steps=3", "--out=run"]
    assert trimtab("train", "tabular", *options).code == 0
    with Run("run") as run:
        config = run.meta["config"]
    assert (config["optimizer"], config["beta2"], config["options"]) == ("trimtab-adamw", 0.9, {"state": "bf16"})
    assert "other settings: options is" in refused("train", "tabular", *options[:1], *options[2:], "--resume")
    assert "cannot read --set 'state'" in refused("train", "tabular", "--set=state")
    assert "lr is given twice" in refused("train", "tabular", "--lr=0.1", "--set=lr=0.1")
    assert "Did you mean 'state'?" in refused("train", "tabular", options[0], "--set=stat=bf16")


def test_a_branch_decays_from_a_checkpoint(trimtab: Callable[..., Any], tmp_path: Path) -> None:
    options = ["--schedule=wsd", "--steps=20", "--checkpoint-every=4", "--keep=9", f"--out={tmp_path / 'long'}"]
    assert trimtab("train", "regression", *options).code == 0
    found = trimtab("branch", str(tmp_path / "long"), "--decay=4", "--at=8", "--form=linear")
    assert found.code == 0, found.err
    assert "12 steps" in found.out
    assert (tmp_path / "long-branch-at-8-4" / "checkpoints").is_dir()
    wrong = trimtab("branch", str(tmp_path / "long"), "--decay=4", "--at=19")
    assert wrong.code == 2
    assert "stable phase" in wrong.err
