"""Kill -9 of a population's workers at random moments: no finished interval lost or repeated, the result the same.

20 kills of the whole command, and of other commands: benchmarks/kill_commands.py.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

CHILD = """
import sys, torch
torch.set_num_threads(1)
from trimtab.tune import train_population
from trimtab.workloads import workload
settings = workload("digits-mlp").defaults.replace(schedule="constant", warmup=0.0, steps=300)
train_population("digits-mlp", ["lr=1e-4:1e-1:log"], folder=sys.argv[1], settings=settings, members=4, interval=50,
    synchronous=True, workers=int(sys.argv[2]))
"""
INTERVALS = 24


def start(folder: Path, workers: int = 0) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", CHILD, str(folder), str(workers)], start_new_session=True)


def records(folder: Path) -> dict[str, tuple[int, bytes]]:
    paths = sorted((folder / "members").glob("*/?????.json"))
    return {str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes()) for path in paths}


def wait_for(folder: Path, count: int, process: subprocess.Popen[bytes]) -> None:
    while len(list((folder / "members").glob("*/?????.json"))) < count and process.poll() is None:
        time.sleep(0.001)


def result(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "population.json").read_text())
    return found


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("uninterrupted")
    assert start(folder).wait() == 0
    return result(folder)


def test_killed_again_and_again_it_ends_where_it_would_have(tmp_path: Path, expected: dict[str, Any]) -> None:
    choose = random.Random(0)
    kept: dict[str, tuple[int, bytes]] = {}
    for target in (2, 9, 17):
        process = start(tmp_path)
        wait_for(tmp_path, target + choose.randrange(4), process)
        time.sleep(choose.uniform(0, 0.1))
        os.killpg(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        after = records(tmp_path)
        assert {key: after[key] for key in kept} == kept
        assert len(after) > len(kept)
        kept = after
    assert len(kept) < INTERVALS
    assert start(tmp_path).wait() == 0
    after = records(tmp_path)
    assert len(after) == INTERVALS
    assert {key: after[key] for key in kept} == kept
    assert result(tmp_path) == expected


def test_a_killed_worker_is_replaced_and_a_second_command_joins(tmp_path: Path, expected: dict[str, Any]) -> None:
    first = start(tmp_path, workers=1)
    wait_for(tmp_path, 3, first)
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:  # ended meanwhile
            continue
    workers = [pid for pid, parent in parents.items() if parent == first.pid]
    assert len(workers) == 1
    os.kill(workers[0], signal.SIGKILL)
    second = start(tmp_path)  # as if on another machine: the same command, the same folder
    assert (first.wait(), second.wait()) == (0, 0)
    found = [json.loads(text) for _, text in records(tmp_path).values()]
    assert len(found) == INTERVALS
    assert len({record["worker"] for record in found}) >= 2
    assert result(tmp_path) == expected
