"""Watching never changes the run: weights bit-equal with and without, for every workload."""

from __future__ import annotations

import pytest
import torch

from trimtab.record import latest_checkpoint, load_checkpoint
from trimtab.workloads import train, workload, workloads

STEPS = 12


@pytest.mark.parametrize("name", [job.name for job in workloads()])
def test_watched_run_ends_with_the_same_weights(name, tmp_path, monkeypatch):
    monkeypatch.setattr(type(workload(name)), "evaluations", 1)  # evaluating draws nothing and takes most of the time
    settings = workload(name).defaults.replace(steps=STEPS)
    states = []
    for watch in (True, False):
        folder = tmp_path / str(watch)
        train(name, settings, out=folder, watch=watch)
        states.append(load_checkpoint(latest_checkpoint(folder))[1])
    watched, free = states
    assert watched["model"].keys() == free["model"].keys()
    assert all(torch.equal(watched["model"][key], free["model"][key]) for key in free["model"])
    assert torch.equal(watched["rng"]["cpu"], free["rng"]["cpu"])
