"""`methods`, `method` and `workloads` show what the catalogue and the workloads hold."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from trimtab import catalogue
from trimtab.workloads import workloads


def test_methods_lists_every_card(trimtab: Callable[..., Any]) -> None:
    found = trimtab("methods")
    assert found.code == 0
    assert all(card.name in found.out for card in catalogue.methods())


def test_methods_json_filters_and_orders(trimtab: Callable[..., Any]) -> None:
    found = json.loads(trimtab("methods", "--treats", "attention-logit-growth", "--json").out)
    places = [card["treats"]["attention-logit-growth"] for card in found]
    assert found[0]["name"] == "qk-norm"
    assert places == sorted(places)
    rooms = json.loads(trimtab("methods", "--room", "losses", "--json").out)
    assert {card["room"] for card in rooms} == {"losses"}


def test_a_room_without_methods_says_so(trimtab: Callable[..., Any]) -> None:
    assert trimtab("methods", "--room", "policy", "--treats", "loss-spike").out == "no such method yet\n"


@pytest.mark.parametrize("name", [card.name for card in catalogue.methods()])
def test_method_shows_the_whole_card(name: str, trimtab: Callable[..., Any]) -> None:
    card = catalogue.method(name)
    shown = " ".join(trimtab("method", name).out.split())
    parts = [card.summary, card.paper.title, card.paper.url, card.claim, card.equation, *card.deviations]
    parts += [test for tests in card.verified.values() for test in tests]
    parts += [text for default in card.defaults for text in (default.name, default.source)]
    parts += [text for entry in card.experiments for text in (entry.treated, entry.outcome)]
    for part in parts:
        assert " ".join(part.split()) in shown
    assert json.loads(trimtab("method", name, "--json").out)["name"] == name


def test_workloads_lists_every_workload(trimtab: Callable[..., Any]) -> None:
    names = [entry.name for entry in workloads()]
    shown = trimtab("workloads").out
    assert all(name in shown for name in names)
    listed = json.loads(trimtab("workloads", "--json").out)
    assert [entry["name"] for entry in listed] == names
    assert listed[names.index("modadd")]["defaults"]["batch_size"] == 0
