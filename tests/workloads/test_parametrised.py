"""Runs in muP: the rates of their groups, the base that remedies are compared with, and a resumed run."""

from __future__ import annotations

import pytest
import torch

from trimtab.compare import Arm
from trimtab.errors import UsageError
from trimtab.record import latest_checkpoint, load_checkpoint
from trimtab.workloads import parse_arm, train, workload
from trimtab.workloads.session import Session


def rates(job, arm):
    run = Session(job, parse_arm(arm, job.defaults), {})
    names = {id(p): name for name, p in run.model.named_parameters()}
    return {
        names[id(p)]: (share, group["weight_decay"])
        for group, share in zip(run.optimizer.param_groups, run.shares, strict=True)
        for p in group["params"]
    }


@pytest.mark.parametrize(
    ("optimizer", "hidden", "embedding"),
    [
        ("adamw", 0.5, 1.0),
        ("trimtab-adamw", 0.5, 1.0),
        ("lion", 0.5, 1.0),
        ("sgd", 1.0, 2.0),
        ("trimtab-sgd", 1.0, 2.0),
    ],
)
def test_a_run_of_twice_the_width_has_mups_rates(optimizer, hidden, embedding):
    found = rates(workload("lm-small"), f"{optimizer},width=128,with=mup")
    assert found["blocks.1.mlp.0.weight"] == (hidden, 0.1 / hidden)
    assert found["embedding.weight"] == (embedding, 0.1 / embedding)
    assert found["norm.weight"] == (embedding, 0.1 / embedding)


def test_at_its_own_width_nothing_changes():
    job = workload("digits-mlp")
    plain, treated = (train(job, parse_arm(f"steps=8{remedy}", job.defaults)) for remedy in ("", ",with=mup"))
    assert plain.loss == treated.loss


def test_remedies_before_it_are_in_the_base_too():
    job = workload("lm-small")
    arm = Arm.parse("width=128,with=qk-norm,with=mup", job.defaults)
    arm.check(job)
    found = Session(job, arm.settings, {})
    assert [name for name, _ in found.applied] == ["qk-norm", "mup"]


def test_optimizers_whose_rates_are_not_known_are_refused():
    job = workload("lm-small")
    with pytest.raises(UsageError, match="not for muon"):
        Arm.parse("muon,width=128,with=mup", job.defaults).check(job)


def test_a_resumed_run_ends_as_an_uninterrupted_one(tmp_path):
    job = workload("digits-mlp")
    settings = parse_arm("steps=12,width=256,with=mup", job.defaults)
    train(job, settings, out=tmp_path / "whole")

    def stop(step, steps, loss):
        if step == 7:
            raise MemoryError

    with pytest.raises(MemoryError):
        train(job, settings, out=tmp_path / "cut", checkpoint_every=5, progress=stop)
    train(job, settings, out=tmp_path / "cut", resume=True)
    one, two = (load_checkpoint(latest_checkpoint(tmp_path / name))[1]["model"] for name in ("whole", "cut"))
    assert all(torch.equal(one[key], two[key]) for key in one)
