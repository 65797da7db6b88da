"""`audit-init`: a workload and a model of one's own, tables for people, JSON for programs, and the exit code."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

_OWN = """
import torch
from torch import nn
import beside

def make_model():
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, beside.CLASSES)), torch.randn(32, 8)

def with_targets():
    return (*make_model(), torch.arange(32) % beside.CLASSES)

def loud():
    model, inputs, targets = with_targets()
    loss = lambda z, t: 100 * nn.functional.cross_entropy(z, t)
    return {"model": model, "inputs": inputs, "targets": targets, "loss": loss}

def wrong():
    return 3

def half():
    return {"model": nn.Linear(2, 2)}

def no_model():
    return "model", torch.ones(2)

def fails():
    raise KeyError("two\\nlines")

def exits():
    raise SystemExit(0)

def unfit():
    return nn.Linear(3, 3), torch.ones(2, 2)
"""


@pytest.fixture
def own(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(_OWN)
    (tmp_path / "beside.py").write_text("CLASSES = 5\n")
    (tmp_path / "broken.py").write_text("def f(:\n")


def test_a_workload(trimtab: Callable[..., Any]) -> None:
    found = trimtab("audit-init", "digits-mlp")
    assert found.code == 0, found
    assert "digits-mlp: variance of outputs and of their gradients at initialisation" in found.out
    assert "against 2.3026 = log(10) of a guess" in found.out
    assert "all 3 layers good" in found.out
    deep = trimtab("audit-init", "digits-mlp", "--depth=12", "--width=64", "--json")
    assert deep.code == 1
    printed = json.loads(deep.out, parse_constant=pytest.fail)
    assert len(printed["layers"]) == 13
    assert printed["layers"][0]["verdict"] == "gradient vanishes"
    assert deep.out == trimtab("audit-init", "digits-mlp", "--depth=12", "--width=64", "--json").out
    assert "gradient vanishes" in trimtab("audit-init", "digits-mlp", "--depth=12", "--width=64").out


def test_methods_are_applied_first(trimtab: Callable[..., Any]) -> None:
    found = trimtab("audit-init", "digits-mlp", "--with=sigma-reparam", "--batch-size=64")
    assert "sigma-reparam: 3 module(s) changed" in found.out
    plain = json.loads(trimtab("audit-init", "digits-mlp", "--json").out)
    changed = json.loads(trimtab("audit-init", "digits-mlp", "--with=sigma-reparam", "--json").out)
    assert plain["layers"][0]["weight_gain"] != changed["layers"][0]["weight_gain"]


@pytest.mark.usefixtures("own")
def test_a_model_of_ones_own(trimtab: Callable[..., Any]) -> None:
    plain = trimtab("audit-init", "own.py:make_model")
    assert plain.code == 0, plain
    assert "first loss" not in plain.out
    judged = trimtab("audit-init", "own.py:with_targets")
    assert "= log(5) of a guess" in judged.out
    loud = trimtab("audit-init", "own.py:loud", "--json")
    assert loud.code == 1
    assert json.loads(loud.out)["first_loss"]["verdict"] == "too high"


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["digits-mlb"], "Did you mean 'digits-mlp'?"),
        (["nowhere.py:make_model"], "nowhere.py is no file"),
        (["own.py:nothing"], "own.py has no function 'nothing'"),
        (["own.py:wrong"], "should return (model, inputs)"),
        (["own.py:half"], "got a dict of model"),
        (["own.py:no_model"], "the model should be a torch.nn.Module, got a str"),
        (["own.py:fails"], "own.py:fails raised KeyError"),
        (["own.py:exits"], "own.py:exits raised SystemExit"),
        (["own.py:unfit"], "the model cannot be run on these inputs"),
        (["broken.py:f"], "broken.py:f raised SyntaxError"),
        (["own.py:make_model", "--width=3"], "leave them out for a file"),
        (["own.py:make_model", "--with=qk-norm"], "no attention to change"),
        (["digits-mlp", "--with=z-loss"], "acts on the loss"),
        (["digits-mlp", "--with=qk-nrom"], "Did you mean 'qk-norm'"),
        (["digits-cnn", "--depth=3"], "has no depth to change"),
        (["digits-mlp", "--batch-size=0"], "must be above 0"),
        (["digits-mlp", "--seed=-1"], "--seed must be 0 or more"),
        (["digits-mlp", f"--seed={2**64}"], "--seed must be 0 or more and below 2^63"),
        ([], "Missing argument"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], text: str, refused: Callable[..., str]) -> None:
    assert text in refused("audit-init", *arguments)
