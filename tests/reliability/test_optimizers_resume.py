"""Every catalogued optimizer goes on bit-exactly in a fresh process from a file that torch loads by default."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys

import pytest
import torch
from torch import nn

from trimtab.catalogue import methods

DTYPES = ("float64", "float32", "bfloat16")
BEFORE, AFTER = 4, 4


def optimizers():
    """Return the class of every optimizer that is made from parameters alone."""
    found = {}
    for card in methods(room="optim"):
        module, _, name = card.entry.partition(":")
        entry = getattr(importlib.import_module(module), name)
        if not (inspect.isclass(entry) and issubclass(entry, torch.optim.Optimizer)):
            continue
        first, *others = inspect.signature(entry).parameters.values()
        closure = inspect.signature(entry.step).parameters.get("closure")
        if closure is None or closure.default is closure.empty:
            continue  # it evaluates the loss itself, more than once
        if first.name == "params" and all(
            p.default is not p.empty or p.kind is p.VAR_KEYWORD or p.kind is p.VAR_POSITIONAL for p in others
        ):
            found[card.name] = entry
    return found


def params(dtype):
    generator = torch.Generator().manual_seed(0)
    shapes = [(12, 20), (20, 12), (7,), ()]
    return [nn.Parameter(torch.randn(shape, generator=generator).to(getattr(torch, dtype))) for shape in shapes]


def run(optimizer, parameters, steps):
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for p in parameters:
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        optimizer.step()


def go_on(folder):
    """What the fresh process does: load each file, take the remaining steps and save the parameters."""
    for name, entry in optimizers().items():
        for dtype in DTYPES:
            saved = torch.load(f"{folder}/{name}-{dtype}.pt")
            parameters = [nn.Parameter(value) for value in saved["params"]]
            optimizer = entry(parameters)
            optimizer.load_state_dict(saved["optimizer"])
            run(optimizer, parameters, range(BEFORE, BEFORE + AFTER))
            torch.save([p.detach() for p in parameters], f"{folder}/{name}-{dtype}-after.pt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    for name, entry in optimizers().items():
        for dtype in DTYPES:
            parameters = params(dtype)
            optimizer = entry(parameters)
            run(optimizer, parameters, range(BEFORE))
            state = {"params": [p.detach() for p in parameters], "optimizer": optimizer.state_dict()}
            torch.save(state, f"{folder}/{name}-{dtype}.pt")
            run(optimizer, parameters, range(BEFORE, BEFORE + AFTER))
            torch.save([p.detach() for p in parameters], f"{folder}/{name}-{dtype}-here.pt")
    code = "import runpy, sys; runpy.run_path(sys.argv[1])['go_on'](sys.argv[2])"
    subprocess.run([sys.executable, "-c", code, __file__, str(folder)], check=True, timeout=200)
    return folder


def test_there_are_optimizers():
    assert {"adamw", "lion", "spam", "came", "galore", "muon"} <= set(optimizers())


@pytest.mark.parametrize("name", sorted(optimizers()))
@pytest.mark.parametrize("dtype", DTYPES)
def test_goes_on_bit_exactly_in_a_fresh_process(folder, name, dtype):
    here = torch.load(f"{folder}/{name}-{dtype}-here.pt", weights_only=True)
    after = torch.load(f"{folder}/{name}-{dtype}-after.pt", weights_only=True)
    assert all(torch.equal(x, y) for x, y in zip(here, after, strict=True))
    # Not each of them: a scalar has no direction orthogonal to itself, and small steps round away in bfloat16.
    assert any(not torch.equal(x, p) for x, p in zip(here, params(dtype), strict=True))
