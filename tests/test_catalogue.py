"""The catalogue finds every Card, and what the Cards say of themselves is true."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from pathlib import Path

import pytest

import trimtab
from trimtab.card import Card
from trimtab.catalogue import method, methods, public_names
from trimtab.errors import UsageError
from trimtab.names import FINDING_NAMES, ROOMS

_ROOT = Path(__file__).parents[1]
_CARDS = methods()
_IDS = [card.name for card in _CARDS]


def _entry(card):
    module, _, name = card.entry.partition(":")
    return getattr(importlib.import_module(module), name)


def _tests_of(path):
    """Return the names of a test file's tests; a class inherits those of the public test case that it subclasses."""
    tree = ast.parse((_ROOT / path).read_text())
    kit = {name: getattr(trimtab.testing, name) for name in trimtab.testing.__all__}
    found = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.ClassDef):
            own = {part.name for part in node.body if isinstance(part, ast.FunctionDef)}
            for base in node.bases:
                own |= set(dir(kit.get(base.id))) if isinstance(base, ast.Name) and base.id in kit else set()
            found |= {f"{node.name}::{name}" for name in own}
    return {name for name in found if name.split("::")[-1].startswith("test_")}


def test_first_methods_are_there():
    assert {"qk-norm", "sigma-reparam", "z-loss", "stablemax", "lower-lr"} <= set(_IDS)


def test_order_is_by_room_and_name():
    assert [(ROOMS.index(card.room), card.name) for card in _CARDS] == sorted(
        (ROOMS.index(card.room), card.name) for card in _CARDS
    )
    assert {card.room for card in methods(room="losses")} == {"losses"}


@pytest.mark.parametrize("finding", sorted(FINDING_NAMES))
def test_remedies_come_in_order(finding):
    places = [card.treats[finding] for card in methods(treats=finding)]
    assert places == sorted(places)


@pytest.mark.parametrize(
    ("finding", "first"),
    [
        ("attention-logit-growth", "qk-norm"),
        ("attention-entropy-collapse", "sigma-reparam"),
        ("output-logit-drift", "z-loss"),
        ("softmax-collapse", "stablemax"),
        ("lr-too-high", "lower-lr"),
        ("loss-divergence", "lower-lr"),
    ],
)
def test_first_remedy(finding, first):
    assert methods(treats=finding)[0].name == first


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: methods(room="layer"), "unknown room 'layer'. Did you mean 'layers'?"),
        (lambda: methods(treats="loss-divergences"), "unknown finding .* Did you mean 'loss-divergence'?"),
        (lambda: method("qknorm"), "unknown method 'qknorm'. Did you mean 'qk-norm'?"),
    ],
)
def test_unknown_names(call, text):
    with pytest.raises(UsageError, match=text):
        call()


@pytest.mark.parametrize("card", _CARDS, ids=_IDS)
def test_names_and_entry(card):
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", card.name)
    assert card.entry.startswith(f"trimtab.{card.room}.")
    entry = _entry(card)
    assert entry.__doc__
    assert getattr(importlib.import_module(f"trimtab.{card.room}"), entry.__name__) is entry
    assert "\n" not in card.summary
    assert card.paper.url.startswith("https://")
    assert card.claim
    assert card.equation


@pytest.mark.parametrize("card", _CARDS, ids=_IDS)
def test_verified_tests_exist(card):
    assert card.verified.get("equation"), "no equation test"
    for ids in card.verified.values():
        for test in ids:
            path, _, name = test.partition("::")
            assert (_ROOT / path).is_file(), test
            assert name in _tests_of(path), test


def test_a_test_that_does_not_exist_is_noticed():
    assert "test_verified_tests_exist" in _tests_of("tests/test_catalogue.py")
    assert "test_of_nothing" not in _tests_of("tests/test_catalogue.py")
    losses = _tests_of("tests/losses/test_stablemax.py")
    assert "TestStablemaxCrossEntropy::test_micro_batches_add_up" in losses
    assert "TestStablemaxCrossEntropy::test_nothing_of_the_kind" not in losses


@pytest.mark.parametrize("card", _CARDS, ids=_IDS)
def test_defaults_are_those_of_the_code(card):
    callables = [part for part in (_entry(card), card.apply) if part is not None]
    options = {
        name: parameter.default
        for part in callables
        for name, parameter in inspect.signature(part).parameters.items()
        if parameter.default is not parameter.empty
    }
    named = [default for default in card.defaults if default.name.isidentifier()]
    for default in named:
        assert options[default.name] == default.value, default.name
        assert default.source


@pytest.mark.parametrize("card", _CARDS, ids=_IDS)
def test_treats_places(card):
    assert all(isinstance(place, int) and place >= 1 for place in card.treats.values())


@pytest.mark.parametrize("card", _CARDS, ids=_IDS)
def test_experiments_are_runnable(card):
    from trimtab.compare import study_options
    from trimtab.workloads.settings import parse_arm
    from trimtab.workloads.workload import workload

    for experiment in card.experiments:
        if experiment.is_study:
            arms = [study_options(experiment.workload, arm) for arm in (experiment.baseline, experiment.treated)]
            assert arms[0] != arms[1]
            assert experiment.seeds >= 3
            continue
        defaults = workload(experiment.workload).defaults
        baseline = parse_arm(experiment.baseline, defaults)
        treated = parse_arm(experiment.treated, defaults)
        assert experiment.seeds >= 3
        if card.acts_on == "optimizer":
            assert_only_the_optimizer_differs(card, baseline, treated)
            continue
        assert card.name in treated.remedies
        assert card.name not in baseline.remedies
        assert treated.replace(remedies=()) == baseline.replace(remedies=())


def assert_only_the_optimizer_differs(card, baseline, treated):
    """An optimizer brings its options, its learning rate and its own betas or momentum; all else is the baseline's."""
    from trimtab.workloads.optimizers import arm_name, own_moments

    name = arm_name(card)
    assert treated.optimizer == name
    assert (baseline.optimizer, baseline.options) != (treated.optimizer, treated.options)
    own = {moment: getattr(treated, moment) for moment in own_moments(name)}
    assert treated == baseline.replace(optimizer=name, options=treated.options, lr=treated.lr, **own)


@pytest.mark.parametrize(
    ("baseline", "treated", "fair"),
    [
        ("adamw,lr=0.01", "lion,lr=0.001", True),
        ("adamw,lr=0.01", "lion,lr=0.001,beta2=0.95,state=bf16", True),
        ("adamw,lr=0.01,spikes=0.1,beta2=0.9", "lion,lr=0.01,spikes=0.1", True),
        ("lion", "lion,state=8bit", True),
        ("adamw,lr=0.01", "adamw,lr=0.02", False),
        ("lion", "lion,lr=0.001", False),
        ("adamw", "lion,weight_decay=0.5", False),
        ("adamw,spikes=0.1", "lion", False),
        ("adamw", "lion,with=qk-norm", False),
    ],
)
def test_fair_comparisons_of_optimizers(baseline, treated, fair):
    from trimtab.workloads.settings import Settings, parse_arm

    card, defaults = method("lion"), Settings(lr=0.1, steps=10)
    arms = parse_arm(baseline, defaults), parse_arm(treated, defaults)
    if fair:
        assert_only_the_optimizer_differs(card, *arms)
    else:
        with pytest.raises(AssertionError):
            assert_only_the_optimizer_differs(card, *arms)


def test_public_names_come_from_the_modules():
    lookup, names = public_names("trimtab.losses")
    assert {"z_loss", "stablemax_cross_entropy", "log_stablemax"} <= set(names())
    assert lookup("z_loss") is importlib.import_module("trimtab.losses.zloss").z_loss
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        lookup("nothing")
    with pytest.raises(AttributeError):
        lookup("_reduction_of_nothing")


def test_every_room_names_only_its_methods():
    assert all(isinstance(card, Card) for card in _CARDS)
    with pytest.raises(AttributeError):
        _ = trimtab.layers.no_such_layer
