"""Jobs in worker processes: what is finished stays, nothing is repeated, nobody is left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from trimtab.compare import Job, Progress, run_jobs
from trimtab.errors import RecordError, RunFailedError, UsageError

_TASKS = """
import os, signal, sys, time, uuid
from pathlib import Path
from trimtab.errors import UsageError

def mark(arguments):
    name = f"{arguments['name']}-{os.getpid()}-{uuid.uuid4().hex}"
    Path(arguments["marks"], name).touch()

def plain(arguments, folder, report):
    mark(arguments)
    folder.mkdir(parents=True)
    (folder / "file").write_text("kept")
    print("chatter that is no message")
    report(1, 0.5)
    return {"value": arguments["value"] * 2, "loss": float("nan")}

def slow(arguments, folder, report):
    mark(arguments)
    time.sleep(arguments["seconds"])
    return {"value": arguments["name"]}

def killed_once(arguments, folder, report):
    mark(arguments)
    if len(list(Path(arguments["marks"]).glob(arguments["name"] + "-*"))) == 1:
        folder.mkdir(parents=True)
        os.kill(os.getpid(), signal.SIGKILL)
    return {"clean": not folder.exists()}

def killed(arguments, folder, report):
    mark(arguments)
    os.kill(os.getpid(), signal.SIGKILL)

def exits(arguments, folder, report):
    mark(arguments)
    os._exit(7)

def raises(arguments, folder, report):
    mark(arguments)
    raise ValueError("first line\\nsecond line")

def refuses(arguments, folder, report):
    raise UsageError("this cannot be asked for")

def reads(arguments, folder, report):
    return {"read": sys.stdin.read(), "threads": os.environ["OMP_NUM_THREADS"]}
"""


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Job]:
    """A maker of jobs whose executions leave marks in `tmp_path/marks`."""
    (tmp_path / "code").mkdir()
    (tmp_path / "marks").mkdir()
    (tmp_path / "code" / "tasks_for_tests.py").write_text(_TASKS)
    monkeypatch.syspath_prepend(tmp_path / "code")

    def make(function: str, name: str = "", **arguments: object) -> Job:
        name = name or function
        return Job(
            f"tasks_for_tests:{function}",
            {"name": name, "marks": str(tmp_path / "marks"), **arguments},
            name,
            steps=int(str(arguments.pop("steps", 1))),
        )

    return make


def _executions(tmp_path: Path, name: str) -> int:
    return len(list((tmp_path / "marks").glob(f"{name}-*")))


def _workers(tmp_path: Path, name: str = "*") -> set[int]:
    return {int(path.name.split("-")[-2]) for path in (tmp_path / "marks").glob(f"{name}-*")}


def _wait(condition: Callable[[], bool], seconds: float = 20.0) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_results_come_in_order_and_nothing_is_repeated(tmp_path: Path, tasks: Callable[..., Job]) -> None:
    jobs = [tasks("plain", f"job{value}", value=value) for value in range(3)]
    jobs.append(jobs[0])
    first = run_jobs(jobs, tmp_path / "out", workers=2)
    assert [result["value"] for result in first] == [0, 2, 4, 0]
    assert first[0]["loss"] != first[0]["loss"]  # a NaN stays one
    more = [tasks("plain", "job3", value=3), *jobs]
    assert [result["value"] for result in run_jobs(more, tmp_path / "out", workers=2)] == [6, 0, 2, 4, 0]
    assert [_executions(tmp_path, f"job{value}") for value in range(4)] == [1, 1, 1, 1]
    assert (tmp_path / "out" / "runs" / jobs[1].key / "file").read_text() == "kept"


def test_a_changed_argument_or_a_damaged_result_is_run_again(tmp_path: Path, tasks: Callable[..., Job]) -> None:
    job = tasks("plain", "job", value=1)
    run_jobs([job], tmp_path / "out", workers=1)
    (tmp_path / "out" / "jobs" / f"{job.key}.json").write_text('{"result": {"val')
    assert run_jobs([job], tmp_path / "out", workers=1)[0]["value"] == 2
    assert run_jobs([tasks("plain", "job", value=5)], tmp_path / "out", workers=1)[0]["value"] == 10
    assert _executions(tmp_path, "job") == 3


def test_progress_counts_steps_over_all_jobs(tmp_path: Path, tasks: Callable[..., Job]) -> None:
    seen: list[Progress] = []
    jobs = [tasks("plain", f"job{value}", value=value, steps=10) for value in range(2)]
    run_jobs(jobs, tmp_path / "out", workers=1, progress=seen.append)
    assert [(entry.done, entry.steps_done) for entry in seen] == [(0, 0), (0, 1), (1, 10), (1, 11), (2, 20)]
    assert {(entry.total, entry.steps_total) for entry in seen} == {(2, 20)}
    assert (seen[1].job, seen[1].loss) == ("job0", 0.5)
    seen.clear()
    run_jobs(jobs, tmp_path / "out", workers=1, progress=seen.append)
    assert [(entry.done, entry.steps_done) for entry in seen] == [(2, 20)]


def test_a_killed_worker_is_replaced_and_its_job_tried_once_more(tmp_path: Path, tasks: Callable[..., Job]) -> None:
    seen: list[Progress] = []
    jobs = [tasks("killed_once"), tasks("plain", value=4)]
    results = run_jobs(jobs, tmp_path / "out", workers=1, progress=seen.append)
    assert results[0] == {"clean": True}
    assert results[1]["value"] == 8
    assert _executions(tmp_path, "killed_once") == 2
    [note] = [entry.note for entry in seen if entry.note]
    assert (
        note
        == "killed_once: its worker was killed by SIGKILL, as the system does when memory runs out; trying once more"
    )


def test_a_job_that_fails_lets_the_others_go_on(tmp_path: Path, tasks: Callable[..., Job]) -> None:
    jobs = [tasks("killed"), tasks("exits"), tasks("raises"), tasks("plain", value=4)]
    with pytest.raises(RunFailedError) as caught:
        run_jobs(jobs, tmp_path / "out", workers=2)
    message = str(caught.value)
    assert "3 of 4 jobs failed" in message
    assert "\n" not in message
    counts = {name: _executions(tmp_path, name) for name in ("killed", "exits", "raises", "plain")}
    assert counts == {"killed": 2, "exits": 2, "raises": 1, "plain": 1}
    assert run_jobs(jobs[3:], tmp_path / "out")[0]["value"] == 8
    assert _executions(tmp_path, "plain") == 1


def test_what_was_asked_wrongly_stops_everything(tmp_path: Path, tasks: Callable[..., Job]) -> None:
    jobs = [tasks("refuses"), tasks("slow", seconds=60)]
    with pytest.raises(UsageError, match=r"^this cannot be asked for$"):
        run_jobs(jobs, tmp_path / "out", workers=1)
    assert _executions(tmp_path, "slow") == 0


def test_a_worker_has_one_thread_and_no_input(tmp_path: Path, tasks: Callable[..., Job]) -> None:
    assert run_jobs([tasks("reads")], tmp_path / "out") == [{"read": "", "threads": "1"}]


def test_wrong_use_is_refused(tmp_path: Path, tasks: Callable[..., Job]) -> None:
    with pytest.raises(UsageError, match="at least 1, got 0"):
        run_jobs([tasks("plain", value=1)], tmp_path / "out", workers=0)
    (tmp_path / "file").touch()
    with pytest.raises(RecordError, match="cannot write in"):
        run_jobs([tasks("plain", value=1)], tmp_path / "file")


def test_no_jobs_need_no_worker(tmp_path: Path) -> None:
    assert run_jobs([], tmp_path / "out") == []


_PARENT = """
import json, sys
from trimtab.compare import Job, run_jobs
sys.path.insert(0, sys.argv[1])
if __name__ == "__main__":
    run_jobs([Job(*entry) for entry in json.loads(sys.argv[2])], sys.argv[3], workers=2)
"""


def _parent(tmp_path: Path, jobs: list[Job]) -> subprocess.Popen[bytes]:
    (tmp_path / "parent.py").write_text(textwrap.dedent(_PARENT))
    listed = json.dumps([[job.task, dict(job.arguments), job.name] for job in jobs])
    home = str(Path(__file__).resolve().parents[2])
    return subprocess.Popen(
        [sys.executable, str(tmp_path / "parent.py"), str(tmp_path / "code"), listed, str(tmp_path / "out")],
        env={**os.environ, "PYTHONPATH": home},
        stderr=subprocess.PIPE,
    )


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="processes are looked at in /proc")
def test_a_killed_parent_leaves_no_worker_no_half_result_and_loses_nothing(
    tmp_path: Path, tasks: Callable[..., Job]
) -> None:
    jobs = [tasks("slow", f"quick{number}", seconds=0) for number in range(4)]
    jobs += [tasks("slow", f"long{number}", seconds=600) for number in range(2)]
    with _parent(tmp_path, jobs) as parent:
        assert _wait(lambda: _executions(tmp_path, "long0") + _executions(tmp_path, "long1") == 2)
        with pytest.raises(UsageError, match="another process is working in"):
            run_jobs(jobs[:1], tmp_path / "out")
        parent.kill()
    workers = _workers(tmp_path)
    assert workers
    assert _wait(lambda: not any(_alive(pid) for pid in workers), 10)
    for path in (tmp_path / "out" / "jobs").glob("*.json"):
        assert json.loads(path.read_text())["result"] == {"value": path.name.split("-")[0]}
    done = {path.name for path in (tmp_path / "out" / "jobs").glob("*.json")}
    assert done == {f"{job.key}.json" for job in jobs[:4]}
    assert [result["value"] for result in run_jobs(jobs[:4], tmp_path / "out")] == [f"quick{n}" for n in range(4)]
    assert [_executions(tmp_path, f"quick{number}") for number in range(4)] == [1, 1, 1, 1]


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="processes are looked at in /proc")
def test_ctrl_c_ends_the_workers(tmp_path: Path, tasks: Callable[..., Job]) -> None:
    with _parent(tmp_path, [tasks("slow", f"long{number}", seconds=600) for number in range(2)]) as parent:
        assert _wait(lambda: len(_workers(tmp_path)) == 2)
        parent.send_signal(signal.SIGINT)
        _, errors = parent.communicate(timeout=20)
    assert errors.rstrip().endswith(b"KeyboardInterrupt")
    assert not any(_alive(pid) for pid in _workers(tmp_path))
    assert not list((tmp_path / "out" / "jobs").glob("*.json"))


def test_results_stay_valid_when_rooms_above_them_change(monkeypatch, tmp_path):
    """A training run does not depend on the code that tunes; what tunes depends on the code that trains."""
    from trimtab.compare import jobs

    home = tmp_path / "trimtab"
    for place in ("compare/jobs.py", "optim/lion.py", "tune/lr/range.py", "bench/suite.py", "trial.py", "cli/app.py"):
        (home / place).parent.mkdir(parents=True, exist_ok=True)
        (home / place).write_text("1")
    monkeypatch.setattr(jobs, "__file__", str(home / "compare" / "jobs.py"))
    tasks = ("trimtab.compare.training:train_job", "trimtab.tune.lr:run", "trimtab.bench.runs:run", "elsewhere:run")

    def keys():
        jobs.fingerprint.cache_clear()
        return [Job(task, {}, "job").key for task in tasks]

    before, changed = keys(), {}
    for place in ("optim/lion.py", "tune/lr/range.py", "trial.py", "bench/suite.py", "cli/app.py"):
        (home / place).write_text("2")
        changed[place] = [one != two for one, two in zip(before, keys(), strict=True)]
        (home / place).write_text("1")
    jobs.fingerprint.cache_clear()
    assert changed == {
        "optim/lion.py": [True, True, True, True],
        "tune/lr/range.py": [False, True, True, True],
        "trial.py": [False, True, True, True],
        "bench/suite.py": [False, False, True, True],
        "cli/app.py": [False, False, False, False],
    }
