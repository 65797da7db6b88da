"""The suite: every task is a run of its workload, decays to 0, and is evaluated evenly."""

from __future__ import annotations

import pytest

from trimtab.bench import SUITE, task, tasks
from trimtab.errors import UsageError


@pytest.mark.parametrize("name", [entry.name for entry in SUITE])
def test_a_task_ends_at_a_learning_rate_of_nearly_0_and_divides_evenly(name: str) -> None:
    entry = task(name)
    settings = entry.settings()
    assert settings.schedule == "cosine"
    assert settings.learning_rate(settings.steps - 1) < 1e-3 * settings.lr
    assert settings.steps % entry.evaluations == 0


def test_the_suite_has_the_seven_tasks() -> None:
    assert len({entry.workload for entry in SUITE}) == len(SUITE) == 7
    assert {"lm-small", "lm-zipf", "modadd", "modadd-nodecay"} < {entry.workload for entry in SUITE}


def test_quick_runs_are_a_tenth() -> None:
    entry = task("digits-mlp")
    assert entry.settings(quick=True).steps * 10 == entry.settings().steps
    assert entry.evaluated(quick=True) == 2


def test_tasks_are_chosen_in_the_order_of_the_suite() -> None:
    assert [entry.name for entry in tasks(["digits-mlp", "grokking"])] == ["grokking", "digits-mlp"]
    assert tasks() == SUITE
    with pytest.raises(UsageError, match="Did you mean 'grokking'"):
        tasks(["groking"])


def test_learning_and_targets() -> None:
    loss, accuracy = task("digits-mlp"), task("grokking")
    assert loss.has_learned(1.0, 2.0)
    assert not loss.has_learned(1.95, 2.0)
    assert accuracy.has_learned(0.6, 0.0)
    assert not accuracy.has_learned(0.02, 0.0)
    assert (loss.target(0.3), accuracy.target(0.8), accuracy.target(0.999)) == (0.3, 0.8, 0.95)
