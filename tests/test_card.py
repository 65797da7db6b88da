"""A Card refuses names that are not public ones, and turns into plain data."""

from __future__ import annotations

import dataclasses
import json

import pytest

from trimtab.card import Card, Default, Experiment, Paper


def _card(**options):
    return Card(
        **{
            "name": "some-method",
            "room": "layers",
            "summary": "does something",
            "paper": Paper("A Title", 2024, arxiv="2401.00001"),
            "equation": "y = x",
            "claim": "helps",
            "acts_on": "model",
            "entry": "some.module:Thing",
            **options,
        }
    )


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"room": "kitchen"}, "Card 'some-method': room 'kitchen' is not one of optim"),
        ({"acts_on": "weather"}, "acts_on 'weather' is not one of model"),
        ({"treats": {"loss-divergence": 1, "bad-luck": 1}}, "treats 'bad-luck', which is not a finding's name"),
        ({"verified": {"proof": ("x",)}}, "level 'proof' is not one of equation"),
    ],
)
def test_wrong_names_are_refused(options, text):
    with pytest.raises(ValueError, match=text):
        _card(**options)


@pytest.mark.parametrize(
    ("paper", "url", "text"),
    [
        (Paper("T", 2024, arxiv="1", doi="2", code="3"), "https://arxiv.org/abs/1", "T (2024, arXiv:1)"),
        (Paper("T", 2024, doi="2", code="3"), "https://doi.org/2", "T (2024, 2)"),
        (Paper("T", 2024, code="https://c"), "https://c", "T (2024, https://c)"),
        (Paper("T", 2024), "", "T (2024)"),
    ],
)
def test_paper_address(paper, url, text):
    assert paper.url == url
    assert str(paper) == text


def test_json_is_plain_data_without_callables():
    card = _card(
        treats={"loss-divergence": 2},
        defaults=(Default("kind", "layer", "paper"),),
        verified={"equation": ("tests/a.py::test_b",)},
        deviations=("none",),
        experiments=(Experiment("lm-small", "lr=0.1", "lr=0.1,with=x"),),
        apply=lambda model: {},
    )
    data = card.to_json()
    assert json.loads(json.dumps(data)) == data
    assert data["paper"]["url"] == "https://arxiv.org/abs/2401.00001"
    assert data["treats"] == {"loss-divergence": 2}
    assert data["defaults"] == [{"name": "kind", "value": "layer", "source": "paper"}]
    assert data["experiments"][0]["seeds"] == 5
    assert "apply" not in data
    assert "apply" not in repr(card)


def test_cards_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        _card().name = "other"
