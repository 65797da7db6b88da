"""Studies of representations: the same for the same seed, and their options act."""

from __future__ import annotations

import math

import pytest
import torch

from trimtab.studies.representation import joint_embedding, places


@pytest.mark.parametrize("study", [joint_embedding, places])
def test_deterministic_and_options_act(study):
    state = torch.get_rng_state()
    first, second, other = study(0, steps=2), study(0, steps=2), study(1, steps=2)
    assert torch.equal(torch.get_rng_state(), state), "the study draws from the global generator"
    assert first == second != other
    assert study(0, steps=2, weight=0.0) != first
    assert all(math.isfinite(value) for value in first.values())


def test_joint_embeddings_collapse_without_regularisation():
    collapsed, kept = joint_embedding(0, steps=25, weight=0.0), joint_embedding(0, steps=25, weight=0.05)
    assert collapsed["prediction"] < 0.01 * kept["prediction"]
    assert collapsed["rank"] < kept["rank"]
