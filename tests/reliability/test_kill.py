"""Kill -9 loses no acknowledged row, and a resumed run ends bit for bit where it would have (50 points: benchmarks)."""

from __future__ import annotations

import random
import runpy
from pathlib import Path
from typing import Any

import pytest

kill = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "kill.py"))


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return kill["uninterrupted"](tmp_path_factory.mktemp("uninterrupted"))


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_killed_run_keeps_its_rows_and_resumes_bit_for_bit(tmp_path: Path, expected: Any, share: float) -> None:
    count = expected[2]
    target = int(share * count) + random.Random(share).randrange(count // 20)
    found = kill["kill_and_resume"](tmp_path / "run", target, random.Random(share).uniform(0, 0.003), expected)
    assert found["killed"]
    assert target <= found["acknowledged_rows"] <= found["rows_found"] < count
    assert found["rows_wrong"] == 0
    assert found["record_equal"]
    assert found["weights_equal"]
