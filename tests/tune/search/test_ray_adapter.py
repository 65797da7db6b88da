"""Trials as tasks of a local Ray: the same journal, the same trials."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from trimtab.errors import UsageError
from trimtab.tune import tune, tune_on_ray

pytest.importorskip("optuna")
ray = pytest.importorskip("ray")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    os.environ["RAY_AUTH_MODE"] = "disabled"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
        except Exception as error:
            pytest.skip(f"ray does not start here: {error}")
        yield ray
        ray.shutdown()


@pytest.mark.filterwarnings("ignore")
def test_tasks_fill_the_slots(cluster: Any, tmp_path: Path) -> None:
    options = {"trials": 4, "sampler": "random", "steps": 10, "seed": 5}
    seen = []
    found = tune_on_ray(
        "tabular", ["lr=1e-3:1:log"], folder=tmp_path / "ray", progress=lambda p: seen.append(p.done), **options
    )
    alone = tune("tabular", ["lr=1e-3:1:log"], folder=tmp_path / "alone", **options)
    assert [(t.number, t.values, t.value) for t in found.trials] == [
        (t.number, t.values, t.value) for t in alone.trials
    ]
    assert seen[-1] == 4
    assert all(trial.worker.startswith("ray-") for trial in found.trials)
    again = tune_on_ray("tabular", ["lr=1e-3:1:log"], folder=tmp_path / "ray", **options)
    assert [t.value for t in again.trials] == [t.value for t in found.trials]


def test_a_function_that_other_machines_cannot_import_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be imported on other machines"):
        tune_on_ray(lambda trial: 0.0, {"x": "0:1"}, trials=1, folder=tmp_path)
