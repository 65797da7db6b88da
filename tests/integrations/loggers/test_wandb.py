from __future__ import annotations

import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from trimtab.errors import MissingExtraError, UsageError
from trimtab.integrations.loggers import WandbMirror
from trimtab.record import Recorder


class FakeRun:
    """What `wandb.init` returns, as far as the mirror may use it."""

    def __init__(self) -> None:
        self.logged: list[dict[str, Any]] = []
        self.metrics: list[tuple[str, str | None]] = []
        self.finished = 0

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.metrics.append((name, step_metric))

    def log(self, data: dict[str, Any]) -> None:
        self.logged.append(data)

    def finish(self) -> None:
        self.finished += 1


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    seen = SimpleNamespace(run=FakeRun(), options={}, settings={})
    module = ModuleType("wandb")

    def init(**options: Any) -> FakeRun:
        seen.options = options
        return seen.run

    def settings(**options: Any) -> dict[str, Any]:
        seen.settings = options
        return options

    module.init, module.Settings = init, settings  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "unset")
    monkeypatch.delenv("WANDB_ERROR_REPORTING")
    return seen


def test_it_is_offline_and_quiet_unless_asked(tmp_path: Path, fake: SimpleNamespace) -> None:
    WandbMirror(tmp_path, config={"lr": 0.1}).close()
    assert fake.options["mode"] == "offline"
    assert fake.options["config"] == {"lr": 0.1}
    assert fake.settings == {"console": "off", "silent": True, "disable_git": True, "save_code": False}
    assert os.environ["WANDB_ERROR_REPORTING"] == "false"
    assert fake.run.finished == 1


def test_each_step_is_one_entry_with_its_step(tmp_path: Path, fake: SimpleNamespace) -> None:
    with Recorder(tmp_path / "run", listeners=[WandbMirror(tmp_path / "wandb")]) as recorder:
        for step in (0, 1):
            recorder.log(step, "loss", 5.0 - step)
            recorder.log(step, "dead_fraction", [0.5], labels=["mlp"])
        recorder.log(0, "eval_loss", 4.0)
    assert fake.run.metrics == [("step", None), ("*", "step")]
    assert fake.run.logged == [
        {"loss": 5.0, "dead_fraction/mlp": 0.5, "step": 0},
        {"loss": 4.0, "dead_fraction/mlp": 0.5, "step": 1},
        {"eval_loss": 4.0, "step": 0},
    ]


def test_the_user_may_go_online(tmp_path: Path, fake: SimpleNamespace) -> None:
    WandbMirror(tmp_path, mode="online")
    assert fake.options["mode"] == "online"


def test_an_unknown_mode_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="Did you mean 'online'"):
        WandbMirror(tmp_path, mode="onlin")


def test_without_wandb_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'trimtab\[wandb\]'"):
        WandbMirror(tmp_path)


def test_the_real_one_writes_an_offline_run(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    with Recorder(tmp_path / "run", listeners=[WandbMirror(tmp_path, config={"lr": 0.1})]) as recorder:
        for step in range(3):
            recorder.log(step, "loss", float(step))
    files = list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert len(files) == 1
    assert b"loss" in files[0].read_bytes()
