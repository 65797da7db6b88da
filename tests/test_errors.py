"""Errors that users meet are one line, name the nearest choice, and carry the exit code's class."""

from __future__ import annotations

import json

import pytest

from trimtab.errors import (
    MissingExtraError,
    RecordError,
    RunFailedError,
    TrimtabError,
    UsageError,
    choose,
    require,
)


def test_choose_returns_a_valid_value():
    assert choose("room", "layers", ("losses", "layers")) == "layers"


def test_choose_proposes_the_nearest():
    with pytest.raises(UsageError) as caught:
        choose("room", "layer", ("losses", "layers"))
    assert str(caught.value) == "unknown room 'layer'. Did you mean 'layers'? Valid: layers, losses."


@pytest.mark.parametrize("value", ["zzz", 3, None, "", ["layers"]])
def test_choose_without_a_near_name(value):
    with pytest.raises(UsageError) as caught:
        choose("room", value, ("losses", "optim"))
    assert "Did you mean" not in str(caught.value)
    assert "Valid: losses, optim." in str(caught.value)
    assert "\n" not in str(caught.value)


def test_choose_from_nothing():
    with pytest.raises(UsageError, match="Valid: none"):
        choose("plugin", "x", ())


def test_require_imports():
    assert require("json", extra="hf") is json


def test_require_says_what_to_install():
    with pytest.raises(MissingExtraError) as caught:
        require("no_such_package_of_ours.part", extra="wandb")
    assert str(caught.value) == "no_such_package_of_ours is not installed: run pip install 'trimtab[wandb]'."


@pytest.mark.parametrize(
    ("kind", "builtin"),
    [
        (UsageError, ValueError),
        (RecordError, OSError),
        (MissingExtraError, ImportError),
        (RunFailedError, RuntimeError),
    ],
)
def test_errors_are_caught_as_ours_and_as_pythons(kind, builtin):
    assert issubclass(kind, TrimtabError)
    assert issubclass(kind, builtin)
    assert str(kind("what to do")) == "what to do"
