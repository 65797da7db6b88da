"""Studies of representations: the same for the same seed, and their options act."""

from __future__ import annotations

import math

import pytest
import torch

from trimtab.studies.representation import _probed, joint_embedding, places


@pytest.mark.parametrize("study", [joint_embedding, places])
def test_deterministic_and_options_act(study):
    state = torch.get_rng_state()
    first, second, other = study(0, steps=2), study(0, steps=2), study(1, steps=2)
    assert torch.equal(torch.get_rng_state(), state), "the study draws from the global generator"
    assert first == second != other
    assert study(0, steps=2, weight=0.0) != first
    assert all(math.isfinite(value) for value in first.values())


def test_probe_does_not_depend_on_the_scale_of_features():
    x = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
    labels = x[:, :3].argmax(-1)
    found = [_probed(scale * x + 5 * scale, labels, scale * x + 5 * scale, classes=3, steps=100) for scale in (1, 1e-3)]
    assert all((each == labels).float().mean() > 0.9 for each in found)


def test_joint_embeddings_collapse_without_regularisation():
    collapsed, kept = joint_embedding(0, steps=25, weight=0.0), joint_embedding(0, steps=25, weight=0.05)
    assert collapsed["prediction"] < 0.01 * kept["prediction"]
    assert collapsed["rank"] < kept["rank"]


@pytest.mark.parametrize("study", [joint_embedding, places])
def test_what_diverged_counts_as_chance(study, monkeypatch):
    """Weights that are not finite end in finite metrics that do not pass for good ones."""
    monkeypatch.setattr(
        "trimtab.studies.representation.fit", lambda parameters, *_, **__: [p.data.fill_(math.nan) for p in parameters]
    )
    found = study(0, steps=1)
    assert all(math.isfinite(value) for value in found.values())
    assert found["accuracy"] < 0.2
