"""Scripts as trials: values by `suggest` or in the arguments, results in three ways, stopped by their reports."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from trimtab.errors import RunFailedError, UsageError
from trimtab.tune import Tuning, tune
from trimtab.tune.search.script_trial import _birth, end_leftover, printed

pytest.importorskip("optuna")


@pytest.fixture
def tuned(tmp_path: Path) -> Any:
    """Write a script and tune it."""

    def run(source: str, *arguments: str, trials: int = 3, space: Any = ("x=0:1",), **options: Any) -> Tuning:
        (tmp_path / "train.py").write_text(source)
        script = str(tmp_path / "train.py")
        return tune(script, space, trials=trials, folder=tmp_path / "out", arguments=list(arguments), **options)

    return run


def test_values_by_suggest_and_results_by_result(tuned: Any, tmp_path: Path) -> None:
    found = tuned(
        "import trimtab.trial as t\n"
        "lr, kind = t.suggest('lr', 1e-3, 1.0, log=True), t.suggest('kind', ['a', 'b'])\n"
        "x = t.suggest('x', 100.0, 200.0)\n"
        "n = t.suggest('n', 1, 8, integer=True)\n"
        "assert isinstance(n, int)\n"
        "for step in range(3):\n"
        "    t.report(lr + 1 / (step + 1), step)\n"
        "t.result(lr, accuracy=0.5)\n"
        "print('not the result', n)\n"
    )
    assert found.subject == "train.py"
    for trial in found.trials:
        assert (trial.status, trial.value) == ("finished", trial.values["lr"])
        assert trial.metrics == {"accuracy": 0.5}
        assert set(trial.values) == {"lr", "kind", "x", "n"}
        assert 0 <= trial.values["x"] <= 1, "what the tuning's space says counts"
        assert (tmp_path / "out" / trial.folder / "output.log").read_text().startswith("not the result")
        assert (tmp_path / "out" / trial.folder / "rank0.sqlite").is_file(), "its reports are its record"


def test_values_in_the_arguments_and_results_in_the_output(tuned: Any) -> None:
    source = "import sys, json\nprint(json.dumps({'loss': float(sys.argv[2]), 'epoch': 1}))\nprint(sys.argv[3])\n"
    found = tuned(source, "--x", "{x}", "{trial}:{folder}", trials=2)
    assert [trial.value for trial in found.trials] == [trial.values["x"] for trial in found.trials]


def test_results_by_a_pattern(tuned: Any) -> None:
    source = "import sys\nprint('val=9')\nprint('val=' + sys.argv[1])\n"
    found = tuned(source, "{x}", trials=2, pattern=r"val=([0-9.e-]+)", metric="val")
    assert [trial.value for trial in found.trials] == [trial.values["x"] for trial in found.trials]


def test_a_report_stops_the_script(tuned: Any, tmp_path: Path) -> None:
    found = tuned(
        "import trimtab.trial as t\n"
        "x = t.suggest('x', 0.0, 1.0)\n"
        "t.report(2.0, 0)\n"
        "try:\n"
        "    t.report(float('nan'), 1)\n"
        "finally:\n"
        "    print('cleaned up')\n"
        "print('went on')\n",
        trials=1,
    )
    (trial,) = found.trials
    assert (trial.status, trial.value) == ("pruned", 2.0)
    assert trial.findings[0]["name"] == "non-finite"
    assert (tmp_path / "out/runs/trial-0/output.log").read_text() == "cleaned up\n"


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("import sys\nprint(sys.argv)\nraise SystemExit('no such data')", "exit code 1: no such data"),
        ("import sys\nprint('nothing')", "it gave no loss: call trimtab.trial.result"),
        ("import trimtab.trial as t\nt.suggest('y', 2, 1)", "low of a range should be below high"),
        ("import trimtab.trial as t\nt.result(float('nan'))", "its metric is not finite, and no finite value"),
    ],
)
def test_a_script_without_a_result_fails_with_a_reason(tuned: Any, source: str, reason: str) -> None:
    with pytest.raises(RunFailedError, match="none of 1 trials") as caught:
        tuned(source, "{x}", trials=1)
    assert reason in str(caught.value)


def test_a_name_of_the_space_that_has_no_effect_is_told(tuned: Any) -> None:
    with pytest.raises(RunFailedError, match="x of the space has no effect: write"):
        tuned("import trimtab.trial as t\nt.result(t.suggest('y', 0, 1))", trials=1)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (["{lr}"], {}, "{lr} stands for nothing in the space; valid: x, folder, trial."),
        (["{x}"], {"pattern": "("}, "is no regular expression"),
        (["{x}"], {"pattern": "loss"}, "should have one group"),
        (["{x}"], {"arm": "sgd"}, "arm belongs to workloads"),
    ],
)
def test_wrong_use_is_one_line(tuned: Any, arguments: list[str], options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        tuned("", *arguments, **options)
    assert message in str(caught.value)


def test_each_process_of_a_script_gets_the_same_value(tuned: Any) -> None:
    found = tuned(
        "import subprocess, sys, trimtab.trial as t\n"
        "own = t.suggest('x', 0.0, 1.0)\n"
        "code = 'import trimtab.trial as t; print(t.suggest(\"x\", 0.0, 1.0))'\n"
        "other = float(subprocess.run([sys.executable, '-c', code], capture_output=True, check=True).stdout)\n"
        "t.result(abs(own - other))\n",
        trials=1,
    )
    assert found.best.value == 0.0


def test_the_last_number_printed_counts() -> None:
    lines = ['{"loss": 3}', "loss=2", '{"loss": "one"}', '{"other": 1}', "[1]", "{broken"]
    assert printed(lines, "loss") == 3.0
    assert printed(lines, "accuracy") is None
    assert printed(lines, "loss", r"loss=(\d)") == 2.0
    assert printed([], "loss", "(x)") is None


def test_a_dead_workers_script_is_ended_but_no_other_process(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as process:
        identity = {"pid": process.pid, "birth": "another process of that number"}
        (tmp_path / "process.json").write_text(json.dumps(identity))
        end_leftover(tmp_path)
        time.sleep(0.05)
        assert process.poll() is None
        (tmp_path / "process.json").write_text(json.dumps({"pid": process.pid, "birth": _birth(process.pid)}))
        end_leftover(tmp_path)
        assert process.wait(10) == -9
    end_leftover(tmp_path)
    end_leftover(tmp_path / "nothing here")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process with its parent")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_script_ends_with_its_worker(tmp_path: Path, how: signal.Signals) -> None:
    (tmp_path / "train.py").write_text("import time\ntime.sleep(60)\n")
    call = "import sys; from trimtab.tune import tune; tune(sys.argv[1], [], trials=1, folder='out', arguments=[])"
    command = [sys.executable, "-c", call, str(tmp_path / "train.py")]
    place = tmp_path / "out" / "runs" / "trial-0" / "process.json"
    worker = subprocess.Popen(command, cwd=tmp_path)
    try:
        deadline = time.monotonic() + 60
        while not (place.is_file() and place.read_text().endswith("}")):
            assert worker.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        time.sleep(0.3)
        worker.send_signal(how)
        worker.wait(30)
        identity = json.loads(place.read_text())
        deadline = time.monotonic() + 10
        while _lives(identity):
            assert time.monotonic() < deadline, "the script outlives its worker"
            time.sleep(0.02)
    finally:
        worker.kill()
        worker.wait()
        end_leftover(place.parent)


def _lives(identity: Any) -> bool:
    try:
        state = Path(f"/proc/{identity['pid']}/stat").read_text().rpartition(")")[2].split()[0]
        return state not in "ZX" and _birth(identity["pid"]) == identity["birth"]
    except OSError:
        return False


def test_a_script_that_will_not_end_is_killed(tuned: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trimtab.tune.search.script_trial._PATIENCE", 0.3)
    source = (
        "import signal, time\nimport trimtab.trial as t\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\nt.report(0.5, 0)\n"
        "try:\n    t.report(float('nan'), 1)\nexcept SystemExit:\n    time.sleep(30)\n"
    )
    began = time.monotonic()
    found = tuned(source, trials=1, space=[])
    assert time.monotonic() - began < 20
    assert (found.best.status, found.best.value) == ("pruned", 0.5)


def test_a_negative_step_is_the_scripts_mistake_not_the_end(tuned: Any) -> None:
    source = "import trimtab.trial as t\nt.report(0.5, -1)\n"
    with pytest.raises(RunFailedError, match="step of a report should be at least 0, got -1"):
        tuned(source, trials=2, space=[], median=True)
