"""The range test on a workload: the batches, optimizer, remedies and clipping of its run."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from trimtab.errors import UsageError
from trimtab.tune import workload_lr_range
from trimtab.workloads import parse_arm, workload


@pytest.mark.parametrize("clip", [0.0, 0.05])
def test_equals_a_plain_loop_over_the_runs_batches(clip):
    job = workload("tabular")
    settings = job.defaults.replace(optimizer="sgd", momentum=0.5, weight_decay=0.0, clip=clip, seed=3)
    found = workload_lr_range(job, settings, lowest=0.01, highest=0.5, steps=10, mode="linear")
    model = job.model(3)
    torch.manual_seed(3)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.5)
    expected = []
    for step in range(10):
        optimizer.param_groups[0]["lr"] = 0.01 + 0.49 * step / 9
        inputs, targets = job.batch(3, step, settings.batch_size)
        optimizer.zero_grad()
        loss = job.loss(model(inputs), targets)
        loss.backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        expected.append(float(loss.detach()))
    assert found.losses == pytest.approx(expected, rel=1e-6)


def test_is_a_pure_function_and_leaves_the_generator_alone():
    state = torch.get_rng_state()
    one, two = (workload_lr_range("tabular", steps=60) for _ in range(2))
    assert one == two
    assert torch.equal(torch.get_rng_state(), state)
    assert one.stopped_because == "diverged"
    assert 1e-4 < one.suggestion < one.largest_stable < 1


def test_remedies_are_applied():
    job = workload("tabular")
    plain = workload_lr_range(job, steps=12)
    treated = workload_lr_range(job, parse_arm("adamw,with=stablemax", job.defaults), steps=12)
    assert plain.losses != treated.losses


def test_wrong_use_is_one_line():
    with pytest.raises(UsageError, match="Did you mean 'tabular'"):
        workload_lr_range("tabuler")
    with pytest.raises(UsageError, match="exceeds the"):
        job = workload("tabular")
        workload_lr_range(job, job.defaults.replace(batch_size=10**6))
