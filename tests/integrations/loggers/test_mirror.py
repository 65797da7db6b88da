from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from trimtab.integrations.loggers import Mirror
from trimtab.record import Recorder, Run


class Keeper(Mirror):
    """Keeps what it is given."""

    def __init__(self, **options: object) -> None:
        super().__init__(**options)  # type: ignore[arg-type]
        self.kept: list[tuple[int, dict[str, float]]] = []
        self.finished = 0

    def put(self, step: int, numbers: Mapping[str, float]) -> None:
        self.kept.append((step, dict(numbers)))

    def finish(self) -> None:
        self.finished += 1


def test_numbers_of_one_step_come_together_in_order(tmp_path: Path) -> None:
    keeper = Keeper()
    with Recorder(tmp_path, listeners=[keeper]) as recorder:
        for step in range(3):
            recorder.log(step, "loss", 5.0 - step)
            recorder.log(step, "attention_max_logit", [1.0, 2.0], labels=["a/head0", ""])
        recorder.log(1, "eval_loss", math.inf)
    expected = [
        (step, {"loss": 5.0 - step, "attention_max_logit/a/head0": 1.0, "attention_max_logit/model": 2.0})
        for step in range(3)
    ]
    assert keeper.kept == [*expected, (1, {"eval_loss": math.inf})]
    assert keeper.finished == 1


def test_only_chosen_signals_are_mirrored() -> None:
    keeper = Keeper(signals=("loss",))
    keeper(0, "loss", (), np.array([1.0]))
    keeper(0, "lr", (), np.array([0.1]))
    keeper.close()
    assert keeper.kept == [(0, {"loss": 1.0})]


def test_a_name_that_a_logger_may_refuse_is_made_fit() -> None:
    keeper = Keeper()
    keeper(0, "my signal:*", ("a(b)<c>",), np.array([1.0]))
    keeper.close()
    assert keeper.kept == [(0, {"my signal__/a_b__c_": 1.0})]


def test_a_listener_hears_only_what_is_acknowledged(tmp_path: Path) -> None:
    heard: list[int] = []
    recorder = Recorder(tmp_path, listeners=[lambda step, name, labels, values: heard.append(step)], flush_every=1e9)
    recorder.log(0, "loss", 1.0)
    assert heard == []
    recorder.flush()
    assert heard == [0]
    recorder._db.execute("PRAGMA query_only=ON")
    recorder.log(1, "loss", 1.0)
    with pytest.warns(RuntimeWarning, match="cannot write"):
        recorder.flush()
    assert heard == [0]
    recorder._db.execute("PRAGMA query_only=OFF")
    recorder.close()
    assert heard == [0, 1]


def test_a_listener_that_raises_is_dropped_and_the_record_is_whole(tmp_path: Path) -> None:
    keeper = Keeper()

    def broken(*entry: object) -> None:
        raise RuntimeError("server gone")

    recorder = Recorder(tmp_path, listeners=[broken, keeper], flush_every=1e9)
    recorder.log(0, "loss", 1.0)
    with pytest.warns(RuntimeWarning, match="drops the listener.*server gone"):
        recorder.flush()
    for step in range(1, 5):
        recorder.log(step, "loss", 1.0)
        recorder.flush()  # a second warning would be an error
    recorder.close()
    assert len(Run(tmp_path).series("loss")) == len(keeper.kept) == 5


def test_a_listener_that_cannot_close_does_no_harm(tmp_path: Path) -> None:
    class Stuck(Keeper):
        def finish(self) -> None:
            raise OSError("disk full")

    keeper = Keeper()
    with (
        pytest.warns(RuntimeWarning, match="drops the listener Stuck"),
        Recorder(tmp_path, listeners=[Stuck(), keeper]) as recorder,
    ):
        recorder.log(0, "loss", 1.0)
    assert Run(tmp_path).status == "finished"
    assert keeper.finished == 1
