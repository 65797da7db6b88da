from __future__ import annotations

import numpy as np
import pytest

from trimtab.diagnose.pathologies.non_finite import PATHOLOGY


def test_the_first_module_and_tensor_are_named(made) -> None:
    loss = np.where(np.arange(100) < 60, 2.0, np.nan)
    signals = made(loss=loss).event(60, "non-finite", module="blocks.2", tensor="output", name="blocks.2")
    match = PATHOLOGY.rule(signals)
    assert match.severity == "critical"
    assert (match.first_step, match.last_step) == (60, 99)
    assert match.modules == ("blocks.2",)
    assert "output of blocks.2" in match.cause
    assert match.evidence["tensor"] == "output"


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_one_non_finite_loss_is_enough(made, value) -> None:
    loss = np.full(100, 2.0)
    loss[40] = value
    assert PATHOLOGY.rule(made(loss=loss)).first_step == 40


def test_gradients_that_stay_non_finite_are_found(made) -> None:
    norms = np.ones(3000)
    norms[50:53] = np.nan
    assert PATHOLOGY.rule(made(loss=np.ones(3000), grad_norm=norms)).first_step == 50
    often = np.ones(3000)
    often[::30] = np.nan
    assert PATHOLOGY.rule(made(loss=np.ones(3000), grad_norm=often)).first_step == 0


def test_steps_that_a_loss_scaler_skips_are_healthy(made) -> None:
    norms = np.ones(3000)
    norms[[0, 1, 1000, 2000]] = np.inf
    signals = made(loss=np.ones(3000), grad_norm=norms)
    signals.event(0, "non-finite", module="head", tensor="gradient", name="head.weight")
    assert PATHOLOGY.rule(signals) is None


def test_a_finite_run_is_healthy(made) -> None:
    assert PATHOLOGY.rule(made(loss=np.ones(10), grad_norm=np.ones(10))) is None
    assert PATHOLOGY.rule(made()) is None
