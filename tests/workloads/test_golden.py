"""Every workload, a few steps: known losses, a falling loss, and the same weights watched or not."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

from trimtab.record import Run, latest_checkpoint, load_checkpoint

golden = runpy.run_path(str(Path(__file__).with_name("golden.py")))
KNOWN = {path.stem: json.loads(path.read_text()) for path in sorted(golden["FOLDER"].glob("*.json"))}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    newest = latest_checkpoint(folder)
    assert newest is not None
    return load_checkpoint(newest)[1]["model"]


@pytest.fixture(scope="module", params=sorted(KNOWN))
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any], Path]:
    """The short run of a workload, unwatched: its name, what a golden file would hold, and its folder."""
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, golden["short_run"](request.param, folder, watch=False), folder


def test_every_workload_has_its_golden_file() -> None:
    from trimtab.workloads import workloads

    assert sorted(KNOWN) == [job.name for job in workloads()]


def test_losses_are_the_known_ones(run: tuple[str, dict[str, Any], Path]) -> None:
    """To 1e-4 on the machine and data they came from; elsewhere rounding differs, and the standard library's text."""
    name, found, _ = run
    known = KNOWN[name]
    same_data = found["fingerprint"]["data"] == known["fingerprint"]["data"]
    tolerance = 1e-4 if found["fingerprint"] == known["fingerprint"] else 0.05 if same_data else 0.2
    assert found["settings"] == known["settings"]
    assert found["initial_loss"] == pytest.approx(known["initial_loss"], rel=tolerance)
    assert found["losses"] == pytest.approx(known["losses"], rel=tolerance)
    assert found["metrics"]["loss"] == pytest.approx(known["metrics"]["loss"], rel=tolerance)


def test_loss_falls(run: tuple[str, dict[str, Any], Path]) -> None:
    name, found, _ = run
    if not name.startswith("modadd"):  # where the test loss rises long before it falls, or never does
        assert found["metrics"]["loss"] < found["initial_loss"]
    assert sum(found["losses"][-3:]) < sum(found["losses"][:3])


def test_watching_changes_no_bit(run: tuple[str, dict[str, Any], Path], tmp_path: Path) -> None:
    name, found, folder = run
    watched = golden["short_run"](name, tmp_path, watch=True)
    assert watched == found
    plain, seen = weights(folder), weights(tmp_path)
    assert list(plain) == list(seen)
    assert all(torch.equal(plain[key], seen[key]) for key in plain)
    with Run(tmp_path) as record:
        assert len(record.series("grad_norm")) == len(found["losses"])
        assert len(record.series("weight_norm_by_module")) >= 1


def test_files_compare_tightly_only_where_the_numbers_came_from() -> None:
    mine = golden["fingerprint"]("sha")
    assert set(mine) == {"data", "torch", "machine"}
    assert all(mine.values())
