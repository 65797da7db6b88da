"""The study of guidance: the same for the same seed, and its options act."""

from __future__ import annotations

import math

import pytest
import torch

from trimtab.studies.guidance import untrainable


def test_deterministic_and_options_act():
    state = torch.get_rng_state()
    first, second, other = (untrainable(seed, steps=4, guide="untrained") for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state), "the study draws from the global generator"
    assert first == second != other
    assert untrainable(0, steps=4, guide="untrained", unbiased=True) != first
    assert all(math.isfinite(value) for value in first.values())


def test_dropout_of_normalised_networks_is_drawn_from_the_seed():
    first, second = (untrainable(0, steps=3, norm=True, depth=3) for _ in range(2))
    assert first == second


def test_the_first_layer_gets_a_signal_from_its_guide_alone():
    alone, guided = untrainable(0, steps=8), untrainable(0, steps=8, guide="untrained")
    assert alone["signal"] < -4 < -2 < guided["signal"]
    assert guided["guide_accuracy"] < 0.4


def test_a_trained_guide_is_trained():
    assert untrainable(0, steps=2, guide="trained")["guide_accuracy"] == pytest.approx(0.97, abs=0.03)
