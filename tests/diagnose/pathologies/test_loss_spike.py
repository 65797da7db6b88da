from __future__ import annotations

import numpy as np

from trimtab.diagnose.pathologies.loss_spike import PATHOLOGY


def decaying(made, noise: float = 0.05, steps: int = 600):
    rng = np.random.default_rng(1)
    step = np.arange(steps)
    return made(loss=1 + 3 * np.exp(-step / 80) + noise * rng.standard_normal(steps))


def test_a_spike_of_several_steps_that_comes_back_is_found(made) -> None:
    signals = decaying(made)
    signals.series("loss").values[300:312, 0] += np.linspace(2.5, 1, 12)
    match = PATHOLOGY.rule(signals)
    assert match.severity == "warning"
    assert 298 <= match.first_step <= 303
    assert 308 <= match.last_step <= 318
    assert match.evidence["spikes"] == 1


def test_every_spike_is_counted(made) -> None:
    signals = decaying(made)
    for at in (250, 350, 450):
        signals.series("loss").values[at : at + 8, 0] += 2
    assert PATHOLOGY.rule(signals).evidence["spikes"] == 3


def test_odd_batches_small_bumps_and_early_noise_are_silent(made) -> None:
    single = decaying(made)
    single.series("loss").values[200::100, 0] += 5
    assert PATHOLOGY.rule(single) is None
    small = decaying(made)
    small.series("loss").values[300:320, 0] += 0.4  # eight sigmas, but an eighth of what was learned
    assert PATHOLOGY.rule(small) is None


def test_a_jump_within_the_noise_is_silent(made) -> None:
    signals = decaying(made, noise=0.5)
    signals.series("loss").values[300:310, 0] += 1.0  # a third of what was learned, two sigmas
    assert PATHOLOGY.rule(signals) is None


def test_a_rise_that_stays_is_a_divergence_not_a_spike(made) -> None:
    signals = decaying(made)
    signals.series("loss").values[400:, 0] += 3
    assert PATHOLOGY.rule(signals) is None


def test_nan_does_not_blind(made) -> None:
    signals = decaying(made)
    signals.series("loss").values[300:315, 0] += 2.5
    signals.series("loss").values[::4] = np.nan
    assert PATHOLOGY.rule(signals) is not None
