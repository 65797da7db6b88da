from __future__ import annotations

import math
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import pytest

from trimtab.errors import MissingExtraError
from trimtab.integrations.loggers import MlflowMirror
from trimtab.record import Recorder


class Metric(NamedTuple):
    key: str
    value: float
    timestamp: int
    step: int


class FakeClient:
    """`mlflow.MlflowClient`, as far as the mirror may use it."""

    made: list[FakeClient]

    def __init__(self, tracking_uri: str) -> None:
        self.address = tracking_uri
        self.batches: list[list[Metric]] = []
        self.params: dict[str, Any] = {}
        self.ended: list[str] = []
        FakeClient.made.append(self)

    def get_experiment_by_name(self, name: str) -> None:
        return None

    def create_experiment(self, name: str) -> str:
        return f"number of {name}"

    def create_run(self, experiment: str, run_name: str | None) -> Any:
        return SimpleNamespace(info=SimpleNamespace(run_id=f"{run_name} in {experiment}"))

    def log_param(self, run: str, key: str, value: Any) -> None:
        self.params[key] = value

    def log_batch(self, run: str, metrics: list[Metric]) -> None:
        assert len(metrics) <= 1000
        self.batches.append(metrics)

    def set_terminated(self, run: str) -> None:
        self.ended.append(run)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[FakeClient]:
    module = ModuleType("mlflow")
    module.MlflowClient = FakeClient  # type: ignore[attr-defined]
    module.entities = SimpleNamespace(Metric=Metric)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mlflow", module)
    for name in ("MLFLOW_DISABLE_TELEMETRY", "MLFLOW_ALLOW_FILE_STORE"):
        monkeypatch.setenv(name, "unset")
        monkeypatch.delenv(name)
    FakeClient.made = []
    return FakeClient


def test_it_writes_to_a_folder_without_telemetry(tmp_path: Path, fake: type[FakeClient]) -> None:
    with Recorder(
        tmp_path / "run", listeners=[MlflowMirror(tmp_path / "ml", name="a", config={"lr": 0.1})]
    ) as recorder:
        recorder.log(0, "loss", 5.0)
        recorder.log(3, "loss", math.nan)
    (client,) = fake.made
    assert client.address == (tmp_path / "ml").resolve().as_uri()
    assert client.params == {"lr": 0.1}
    assert [(metric.key, metric.step) for batch in client.batches for metric in batch] == [("loss", 0), ("loss", 3)]
    assert client.ended == ["a in number of trimtab"]
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"


def test_many_numbers_go_in_batches_that_mlflow_takes(tmp_path: Path, fake: type[FakeClient]) -> None:
    labels = [f"layer{index}" for index in range(2500)]
    with Recorder(tmp_path / "run", listeners=[MlflowMirror(tmp_path / "ml")]) as recorder:
        recorder.log(0, "activation_max", range(2500), labels=labels)
    assert [len(batch) for batch in fake.made[0].batches] == [1000, 1000, 500]


def test_a_server_is_taken_as_given(fake: type[FakeClient]) -> None:
    MlflowMirror("http://127.0.0.1:5000")
    assert fake.made[0].address == "http://127.0.0.1:5000"
    assert "MLFLOW_ALLOW_FILE_STORE" not in os.environ


def test_without_mlflow_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'trimtab\[mlflow\]'"):
        MlflowMirror(tmp_path)


def test_the_real_one_gives_back_what_was_recorded(tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow")
    with Recorder(tmp_path / "run", listeners=[MlflowMirror(tmp_path / "ml", config={"lr": 0.1})]) as recorder:
        for step in range(4):
            recorder.log(step, "loss", float(step))
            recorder.log(step, "dead_fraction", [0.5], labels=["a(b)/head0"])
    client = mlflow.MlflowClient(tracking_uri=(tmp_path / "ml").resolve().as_uri())
    (run,) = client.search_runs([client.get_experiment_by_name("trimtab").experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params == {"lr": "0.1"}
    assert [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "loss")] == [(s, s) for s in range(4)]
    assert run.data.metrics["dead_fraction/a_b_/head0"] == 0.5
