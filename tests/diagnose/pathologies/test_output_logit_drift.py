from __future__ import annotations

import numpy as np

from trimtab.diagnose.pathologies.output_logit_drift import PATHOLOGY


def drifting(made, to: float):
    samples = 100
    return made().put("logits_abs_log_z", np.linspace(4.6, to, samples), every=10).about(n_classes=97)


def test_drift_is_found_where_it_passes_the_level(made) -> None:
    match = PATHOLOGY.rule(drifting(made, 300.0))
    # 4.6 + 295.4 i / 99 >= 100 for i >= 31.97: sample 32.
    assert match.severity == "warning"
    assert (match.first_step, match.last_step) == (320, 990)
    assert match.evidence["bfloat16_spacing"] == 2.0


def test_a_drift_ten_times_beyond_is_critical(made) -> None:
    assert PATHOLOGY.rule(drifting(made, 3000.0)).severity == "critical"


def test_what_a_confident_fit_needs_is_healthy(made) -> None:
    assert PATHOLOGY.rule(drifting(made, 35.0)) is None


def test_a_drift_that_came_back_is_silent(made) -> None:
    values = np.concatenate([np.linspace(4, 300, 50), np.linspace(300, 10, 50)])
    assert PATHOLOGY.rule(made().put("logits_abs_log_z", values, every=10)) is None


def test_nan_does_not_blind(made) -> None:
    signals = drifting(made, 300.0)
    signals.series("logits_abs_log_z").values[::3] = np.nan
    assert PATHOLOGY.rule(signals) is not None
