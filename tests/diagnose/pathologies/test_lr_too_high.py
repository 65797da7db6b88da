from __future__ import annotations

import numpy as np

from trimtab.diagnose.pathologies.lr_too_high import PATHOLOGY


def run(made, points, update: float, noise: float = 0.05, steps: int = 400):
    rng = np.random.default_rng(5)
    loss = np.interp(np.arange(steps), *zip(*points, strict=True)) + noise * rng.standard_normal(steps)
    ratio = np.full((steps // 10, 3), update)
    return made(loss=loss, lr=np.full(steps, 0.5)).put("update_ratio_by_module", ratio)


OVERSHOT = [(0, 2.3), (10, 30), (100, 2.5), (400, 1.0)]
STUCK = [(0, 2.3), (400, 2.3)]
UNDONE = [(0, 2.3), (150, 0.3), (180, 2.3), (400, 2.2)]


def test_an_overshoot_with_large_updates_is_found(made) -> None:
    match = PATHOLOGY.rule(run(made, OVERSHOT, 0.3))
    assert match.severity == "warning"
    assert match.first_step <= 15
    assert 80 <= match.last_step <= 115
    assert match.evidence["lr"] == 0.5
    assert match.evidence["update_ratio"] == 0.3


def test_a_loss_that_never_leaves_its_beginning_is_critical(made) -> None:
    assert PATHOLOGY.rule(run(made, STUCK, 0.3)).severity == "critical"


def test_a_loss_that_is_lost_again_is_found_where_it_was_lost(made) -> None:
    assert abs(PATHOLOGY.rule(run(made, UNDONE, 0.3)).first_step - 165) <= 15


def test_damage_with_small_updates_has_another_cause(made) -> None:
    for points in (OVERSHOT, STUCK, UNDONE):
        assert PATHOLOGY.rule(run(made, points, 0.02)) is None


def test_large_updates_without_damage_are_healthy(made) -> None:
    assert PATHOLOGY.rule(run(made, [(0, 2.3), (400, 0.2)], 0.3)) is None
    assert PATHOLOGY.rule(run(made, [(0, 2.3), (400, 0.2)], 0.3, noise=0.4)) is None


def test_clipping_to_nearly_nothing_is_a_sign_too(made) -> None:
    signals = run(made, OVERSHOT, 0.005)
    signals.put("grad_clip", np.full(400, 0.01))
    assert PATHOLOGY.rule(signals).evidence["clip_factor"] == 0.01


def test_nan_does_not_blind(made) -> None:
    signals = run(made, OVERSHOT, 0.3)
    signals.series("loss").values[1::4] = np.nan
    signals.series("update_ratio_by_module").values[::2] = np.nan
    assert PATHOLOGY.rule(signals) is not None
