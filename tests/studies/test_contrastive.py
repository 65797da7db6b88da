"""Studies of contrastive losses: the same for the same seed, and their options act."""

from __future__ import annotations

import math

import pytest
import torch

from trimtab.errors import UsageError
from trimtab.studies.contrastive import halves, sequences


@pytest.mark.parametrize(("study", "change"), [(halves, {"group": 8}), (sequences, {"objective": "supcl-seq"})])
def test_deterministic_and_options_act(study, change):
    state = torch.get_rng_state()
    first, second, other = study(0, steps=4), study(0, steps=4), study(1, steps=4)
    assert torch.equal(torch.get_rng_state(), state), "the study draws from the global generator"
    assert first == second != other
    assert study(0, steps=4, **change) != first
    assert all(math.isfinite(value) for value in first.values())


def test_cached_groups_are_the_whole_batch():
    whole, cached = halves(0, steps=5), halves(0, steps=5, group=8, cached=True)
    assert cached == pytest.approx(whole, rel=1e-3)
    assert halves(0, steps=5, group=8)["negatives"] == 7


def test_embeddings_that_are_all_the_same_or_nan_find_nothing(monkeypatch):
    for value in (1.0, math.nan):
        monkeypatch.setattr("trimtab.studies.contrastive.F.normalize", lambda x, dim, value=value: x * 0 + value)
        assert halves(0, steps=0)["recall"] == 0


def test_groups_divide_the_batch():
    with pytest.raises(UsageError, match="group must divide 64, got 10"):
        halves(0, group=10)


@pytest.mark.parametrize("study", [sequences])
def test_what_diverged_counts_as_chance(study, monkeypatch):
    """Weights that are not finite end in finite metrics that do not pass for good ones."""
    monkeypatch.setattr(
        "trimtab.studies.contrastive.fit", lambda parameters, *_, **__: [p.data.fill_(math.nan) for p in parameters]
    )
    found = study(0, steps=1)
    assert all(math.isfinite(value) for value in found.values())
    assert found["accuracy"] < 0.2
