"""The range test on a workload: the batches, optimizer, remedies and clipping of its run."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from trimtab.errors import UsageError
from trimtab.tune import LRRange, LRRanges, workload_lr_range, workload_lr_ranges
from trimtab.workloads import parse_arm, workload
from trimtab.workloads.session import Session
from trimtab.workloads.workload import seeded


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


def test_a_curriculum_shapes_the_batches_of_the_test():
    job = workload("tabular")
    settings = parse_arm("sgd,with=batch-warmup", job.defaults)
    with seeded(settings.seed):
        run = Session(job, settings, {})
    inputs, targets = run.batches(0)
    assert len(inputs) < settings.batch_size
    found = workload_lr_range(job, settings, steps=10)
    with torch.no_grad():
        assert found.losses[0] == pytest.approx(float(job.loss(run.model(inputs), targets)), rel=1e-6)


def test_rates_are_those_of_the_settings_where_groups_have_more():
    job = workload("digits-mlp")
    settings = parse_arm("sgd,momentum=0,width=512,with=mup", job.defaults)
    found = workload_lr_range(job, settings, lowest=0.01, highest=1.0, steps=10)
    assert found.lrs[0] == pytest.approx(0.01)
    with seeded(settings.seed):
        run = Session(job, settings.replace(lr=0.01), {})
    assert max(run.shares) == 4
    run.settings = run.settings.replace(schedule="constant", warmup=0)
    first = run.step(None, None)
    assert (found.losses[0], found.losses[1]) == pytest.approx((first, _loss(run, 1)), rel=1e-5)


def _loss(run, step):
    inputs, targets = run.batches(step)
    with torch.no_grad():
        return float(run.loss(run.model(inputs), targets))


def test_wrong_use_is_one_line():
    with pytest.raises(UsageError, match="Did you mean 'tabular'"):
        workload_lr_range("tabuler")
    with pytest.raises(UsageError, match="exceeds the"):
        job = workload("tabular")
        workload_lr_range(job, job.defaults.replace(batch_size=10**6))


def _test(suggestion, largest=None, reason=""):
    return LRRange((), (), (), "diverged", suggestion, largest, reason)


def test_suggestion_is_the_median_in_log():
    ranges = LRRanges((0, 1, 2, 3), (_test(1e-4, 1e-3), _test(1e-1, 1.0), _test(1e-3, 0.1), _test(1e-2, 0.01)))
    assert ranges.suggestion == pytest.approx(math.sqrt(1e-3 * 1e-2), rel=1e-12)
    assert ranges.largest_stable == pytest.approx(math.sqrt(0.01 * 0.1), rel=1e-12)
    assert ranges.bounds("suggestion") == (1e-4, 1e-1)
    assert LRRanges((0, 1, 2), (_test(0.3), _test(0.1), _test(0.2))).suggestion == 0.2


def test_half_of_the_seeds_is_not_enough():
    ranges = LRRanges((4, 5), (_test(0.1, 0.2), _test(None, reason="noise.")))
    assert ranges.suggestion is None
    assert ranges.reason == "1 of 2 seeds give no suggestion; seed 5: noise."
    three = LRRanges((4, 5, 6), (_test(0.1, 0.2), _test(None, reason="noise."), _test(0.4, 0.8)))
    assert three.suggestion == pytest.approx(0.2, rel=1e-12)
    assert three.to_json()["suggestion_range"] == [0.1, 0.4]


def test_each_seed_is_a_job_of_its_own(tmp_path):
    job = workload("tabular")
    settings = job.defaults.replace(seed=5)
    found = workload_lr_ranges(job, settings, folder=tmp_path, seeds=2, steps=12, workers=1)
    assert found.seeds == (5, 6)
    assert found.tests == tuple(workload_lr_range(job, settings.replace(seed=seed), steps=12) for seed in (5, 6))


def test_a_loss_that_is_always_nan_is_no_suggestion():
    job = workload("tabular")
    job.loss = lambda outputs, targets: outputs.sum() * float("nan")
    found = workload_lr_range(job, steps=12)
    assert (found.stopped_because, found.suggestion, found.losses) == ("non-finite", None, ())
    assert "non-finite" in LRRanges((0,), (found,)).reason
