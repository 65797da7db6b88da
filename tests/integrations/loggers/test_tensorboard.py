from __future__ import annotations

import math
from pathlib import Path

import pytest

from trimtab.errors import MissingExtraError
from trimtab.integrations.loggers import TensorBoardMirror
from trimtab.record import Recorder


def test_the_event_file_gives_back_what_was_recorded(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with Recorder(tmp_path / "run", listeners=[TensorBoardMirror(tmp_path / "tb")]) as recorder:
        for step in range(20):
            recorder.log(step, "loss", math.inf if step == 7 else 5.0 - step / 4)
            recorder.log(step, "grad_norm_by_module", [0.5, step], labels=["", "blocks.0"])
    events = EventAccumulator(str(tmp_path / "tb"), size_guidance={"scalars": 0})
    events.Reload()
    assert sorted(events.Tags()["scalars"]) == ["grad_norm_by_module/blocks.0", "grad_norm_by_module/model", "loss"]
    loss = [(event.step, event.value) for event in events.Scalars("loss")]
    assert loss == [(step, math.inf if step == 7 else 5.0 - step / 4) for step in range(20)]
    assert [event.value for event in events.Scalars("grad_norm_by_module/blocks.0")] == [
        float(step) for step in range(20)
    ]


def test_without_tensorboard_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "tensorboard", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'trimtab\[tensorboard\]'"):
        TensorBoardMirror(tmp_path)
    assert list(tmp_path.iterdir()) == []
