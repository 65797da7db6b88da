"""The recall study: the task is what it says, options act, and the same seed gives the same numbers."""

from __future__ import annotations

import math

import pytest
import torch

from trimtab.errors import UsageError
from trimtab.studies import recall as study
from trimtab.studies.recall import recall

SMALL = {"steps": 3, "pairs": 3, "kinds": 4}


def test_every_question_has_its_answer():
    keys, values, answers = study._sequences(torch.Generator().manual_seed(0), 50, 5, 8)
    assert keys.shape == values.shape == (50, 10)
    assert (values[:, 5:] == 8).all()
    for row in range(50):
        told = dict(zip(keys[row, :5].tolist(), values[row, :5].tolist(), strict=True))
        assert len(told) == 5
        assert [told[key] for key in keys[row, 5:].tolist()] == answers[row].tolist()


@pytest.mark.parametrize("mixer", ["linear", "gla", "gated-deltanet"])
def test_same_seed_same_numbers(mixer):
    first = recall(1, mixer=mixer, **SMALL)
    assert first == recall(1, mixer=mixer, **SMALL)
    assert first != recall(2, mixer=mixer, **SMALL)
    assert all(math.isfinite(value) for value in first.values())


def test_mixers_differ_but_share_their_size():
    runs = [recall(0, mixer=mixer, **SMALL) for mixer in ("linear", "gla", "gated-deltanet")]
    assert len({run["loss"] for run in runs}) == 3
    assert runs[0]["parameters"] == runs[1]["parameters"]
    assert 0.8 < runs[2]["parameters"] / runs[1]["parameters"] <= 1
    parts = [study._Model(mixer, 4).mixer[1] for mixer in ("gla", "gated-deltanet")]
    assert parts[0].sizes == parts[1].sizes


def test_what_is_outside_the_mixer_starts_the_same():
    models = []
    for mixer in ("gla", "gated-deltanet"):
        torch.manual_seed(0)
        models.append(study._Model(mixer, 4))
    for name in ("keys", "values", "mlp", "head"):
        for p, q in zip(getattr(models[0], name).parameters(), getattr(models[1], name).parameters(), strict=True):
            assert torch.equal(p, q)


def test_a_run_that_diverges_counts():
    assert all(math.isfinite(value) for value in recall(0, lr=1e6, **SMALL).values())


@pytest.mark.parametrize(("options", "text"), [({"mixer": "gpa"}, "Did you mean 'gla'"), ({"pairs": 40}, "pairs must")])
def test_wrong_options(options, text):
    with pytest.raises(UsageError, match=text):
        recall(0, **options)
