from __future__ import annotations

import numpy as np
import pytest

from trimtab.diagnose.pathologies.softmax_collapse import PATHOLOGY


def collapsing(made, **held_out):
    zero = np.concatenate([np.zeros(40), np.linspace(0, 0.9, 20)])
    signals = made().put("zero_loss_fraction", zero, every=10).put("train_accuracy", np.ones(60), every=10)
    signals.put("loss", np.concatenate([np.linspace(4.6, 0, 100), np.zeros(500)]))
    for name, value in held_out.items():
        signals.put(name, [value], steps=[590])
    return signals


def test_zero_losses_with_poor_held_out_accuracy_are_critical(made) -> None:
    match = PATHOLOGY.rule(collapsing(made, eval_accuracy=0.3))
    # 0.9 i / 19 >= 0.1 for i >= 2.1: sample 43.
    assert match.severity == "critical"
    assert (match.first_step, match.last_step) == (430, 590)
    assert match.evidence["eval_accuracy"] == 0.3
    assert match.evidence["train_accuracy"] == 1.0


def test_a_held_out_loss_speaks_where_there_is_no_accuracy(made) -> None:
    assert PATHOLOGY.rule(collapsing(made, eval_loss=40.0)).evidence["eval_loss"] == 40.0
    assert PATHOLOGY.rule(collapsing(made, eval_loss=0.1)) is None


@pytest.mark.parametrize("held_out", [{"eval_accuracy": 0.95}, {}])
def test_a_finished_fit_is_healthy(made, held_out) -> None:
    assert PATHOLOGY.rule(collapsing(made, **held_out)) is None


def test_a_model_that_has_not_fitted_its_data_has_another_fault(made) -> None:
    signals = collapsing(made, eval_accuracy=0.3)
    signals.series("train_accuracy").values[:] = 0.8
    assert PATHOLOGY.rule(signals) is None


def test_zero_losses_that_went_away_again_are_silent(made) -> None:
    signals = collapsing(made, eval_accuracy=0.3)
    signals.series("zero_loss_fraction").values[50:] = 0.0
    assert PATHOLOGY.rule(signals) is None


def test_nan_does_not_blind(made) -> None:
    signals = collapsing(made, eval_accuracy=0.3)
    signals.series("zero_loss_fraction").values[::3] = np.nan
    signals.series("train_accuracy").values[-1] = np.nan
    assert PATHOLOGY.rule(signals) is not None
