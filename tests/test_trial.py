"""`trimtab.trial` outside a tuning: a script runs as it is, and wrong use is told there too."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from trimtab import trial
from trimtab.errors import RunFailedError, UsageError


def test_outside_a_tuning_nothing_happens() -> None:
    assert not trial.active()
    assert trial.folder() is None
    trial.report(float("nan"), 3)
    trial.result(1.0, accuracy=0.5)


def test_the_middle_or_the_default() -> None:
    assert trial.suggest("lr", 1e-4, 1e-2, log=True) == 1e-3
    assert trial.suggest("lr", 1e-4, 1e-2, default=0.5) == 0.5
    assert trial.suggest("n", 1, 4, integer=True) == 2
    assert trial.suggest("kind", ["b", "a"]) == "b"
    assert trial.suggest("flag", [True, False], default=False) is False
    with pytest.raises(UsageError, match="cannot suggest lr: low of a range should be below high"):
        trial.suggest("lr", 2, 1)
    with pytest.raises(UsageError, match="cannot suggest lr: low of a logarithmic range"):
        trial.suggest("lr", 0, 1, log=True)


def test_a_trial_whose_worker_is_gone_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIMTAB_TRIAL", str(tmp_path))
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    (tmp_path / "worker.pid").write_text(str(process.pid))
    assert trial.active()
    assert trial.folder() == tmp_path
    with pytest.raises(RunFailedError, match="is gone"):
        trial.suggest("x", 0, 1)


def test_a_script_loads_nothing_heavy_for_it() -> None:
    code = (
        "import sys, trimtab; trimtab.trial.report(1.0, 2);"
        "print(sorted({'torch', 'numpy', 'optuna'} & set(sys.modules)))"
    )
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env=os.environ)
    assert output.stdout.strip() == "[]"


def test_numbers_of_numpy_and_ranges_go_into_messages_as_plain_ones() -> None:
    asked = {"low": [np.int64(1), np.float32(0.5), True, "a"], "high": np.float64("inf"), "step": np.int32(2)}
    plain = trial._plain(asked)
    assert plain == {"low": [1, 0.5, True, "a"], "high": "inf", "step": 2}
    assert json.loads(json.dumps(plain)) == plain
