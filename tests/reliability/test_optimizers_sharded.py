"""Every catalogued optimizer on four ranks, fully sharded and in replicas of shards, against a single process."""

from __future__ import annotations

import importlib
import inspect

import pytest
import torch
from torch import nn

from trimtab.catalogue import methods
from trimtab.optim import Chain
from trimtab.testing import run_ranks

STEPS = 5


def chains():
    """Return the class of every optimizer that is a chain made from parameters alone."""
    found = {}
    for card in methods(room="optim"):
        module, _, name = card.entry.partition(":")
        entry = getattr(importlib.import_module(module), name)
        if not (inspect.isclass(entry) and issubclass(entry, Chain)):
            continue
        _, *others = inspect.signature(entry).parameters.values()
        if all(p.default is not p.empty or p.kind is p.VAR_KEYWORD for p in others):
            found[card.name] = entry
    return found


CHAINS = chains()


def model():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        # Rows that four ranks share unevenly, and a bias with less than one entry for each.
        return nn.Sequential(nn.Linear(5, 10), nn.Tanh(), nn.Linear(10, 3)).double()


def train(net, entry):
    optimizer = entry(net.parameters())
    for step in range(STEPS):
        x = torch.randn(8, 5, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        optimizer.zero_grad()
        (net(x) - x[:, :3]).square().mean().backward()
        optimizer.step()
    return optimizer


def work(rank, shape):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    names = ("replicas", "shards")[-len(shape) :]
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    results = {}
    for name, entry in CHAINS.items():
        net = model()
        fully_shard(net, mesh=mesh)
        train(net, entry)
        results[name] = [p.full_tensor().detach() for p in net.parameters()]
    return results


@pytest.fixture(scope="module")
def alone():
    found = {}
    for name, entry in CHAINS.items():
        net = model()
        train(net, entry)
        found[name] = [p.detach().clone() for p in net.parameters()]
    return found


@pytest.mark.parametrize("shape", [(4,), (2, 2)], ids=["sharded", "replicas of shards"])
def test_four_ranks_do_what_one_process_does(alone, shape):
    start = [p.detach() for p in model().parameters()]
    for results in run_ranks(lambda rank: work(rank, shape), 4):
        for name, values in results.items():
            for x, y, before in zip(values, alone[name], start, strict=True):
                assert not torch.equal(y, before), name
                torch.testing.assert_close(x, y, rtol=1e-7, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")
