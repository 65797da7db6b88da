"""Kill -9 loses no trial that has ended and repeats none (20 points: benchmarks/tune_kill.py)."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("optuna")

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def kill() -> Any:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        spec = importlib.util.spec_from_file_location("tune_kill", BENCHMARKS / "tune_kill.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(BENCHMARKS))
    return module


def test_killed_tuning_ends_as_if_it_had_not_been(tmp_path: Path, kill: Any) -> None:
    with kill.Nursery() as nursery:
        expected = kill.uninterrupted(nursery, tmp_path / "whole", 16)
        found = kill.kill_and_go_on(nursery, tmp_path / "killed", 16, kills=4, seed=1, longest=0.1)
    assert found["kills"] == 4
    assert found["trials"] == 16
    assert found["numbers"]
    assert (found["lost"], found["repeated"], found["changed"]) == (0, 0, 0)
    assert found["results"] == expected
