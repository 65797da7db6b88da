"""A branch of a run is the run that it would have been from the start, and leaves its origin alone."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch

from trimtab.errors import UsageError
from trimtab.record import Run, latest_checkpoint, load_checkpoint
from trimtab.workloads import Settings, branch, branched, train, workload

WSD = {"schedule": "wsd", "schedule.decay": 10, "steps": 40, "warmup": 0.1}


def weights(folder):
    return load_checkpoint(latest_checkpoint(folder))[1]["model"]


def files(folder):
    """Contents of what a run left; SQLite's own side files come and go with readers."""
    return {
        path.relative_to(folder): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in Path(folder).rglob("*")
        if path.is_file() and not path.name.endswith(("-wal", "-shm"))
    }


@pytest.mark.parametrize("name", ["digits-vit", "regression"])
def test_a_branch_equals_the_run_from_the_start_and_leaves_its_origin_alone(name, tmp_path):
    job = workload(name)
    settings = job.defaults.replace(**WSD)
    train(job, settings, out=tmp_path / "long", checkpoint_every=8, keep=10)
    before = files(tmp_path / "long")
    found = branch(tmp_path / "long", at=16, decay=7, form="linear", out=tmp_path / "short")
    assert files(tmp_path / "long") == before
    wanted = job.defaults.replace(
        **{**WSD, "steps": 23, "schedule.warmup": 4, "schedule.decay": 7, "schedule.form": "linear"}
    )
    whole = train(job, wanted, out=tmp_path / "whole")
    assert found.loss == whole.loss
    one, two = weights(tmp_path / "short"), weights(tmp_path / "whole")
    assert all(torch.equal(one[key], two[key]) for key in one)
    with Run(tmp_path / "short") as short, Run(tmp_path / "whole") as reference:
        assert short.series("lr").steps[0] == 16
        assert short.series("lr").flat.tolist() == reference.series("lr").flat.tolist()[16:]


def test_an_interrupted_branch_goes_on_where_it_was(tmp_path):
    job = workload("regression")
    train(job, job.defaults.replace(**WSD), out=tmp_path / "long", checkpoint_every=10, keep=10)
    whole = branch(tmp_path / "long", at=20, decay=12, out=tmp_path / "whole")

    def stop(step, steps, loss):
        if step == 27:
            raise MemoryError

    with pytest.raises(MemoryError):
        branch(tmp_path / "long", at=20, decay=12, out=tmp_path / "cut", checkpoint_every=5, progress=stop)
    again = branch(tmp_path / "long", at=20, decay=12, out=tmp_path / "cut", resume=True)
    assert again.loss == whole.loss

    with pytest.raises(MemoryError):  # before its first checkpoint
        branch(tmp_path / "long", at=20, decay=12, out=tmp_path / "early", progress=stop)
    assert branch(tmp_path / "long", at=20, decay=12, out=tmp_path / "early", resume=True).loss == whole.loss


def test_the_newest_checkpoint_of_the_stable_phase_is_the_default(tmp_path):
    job = workload("regression")
    train(job, job.defaults.replace(**WSD), out=tmp_path / "long", checkpoint_every=8, keep=10)
    assert branch(tmp_path / "long", decay=3, out=tmp_path / "short").steps == 24 + 3


@pytest.mark.parametrize(
    ("settings", "at", "text"),
    [
        (Settings(lr=0.1, steps=100), 50, "only runs with schedule=wsd or constant can branch, this one has cosine"),
        (Settings(lr=0.1, steps=100, schedule="wsd"), 9, "steps 10 to 80, got 9"),
        (Settings(lr=0.1, steps=100, schedule="wsd"), 81, "steps 10 to 80, got 81"),
    ],
)
def test_only_the_stable_phase_can_branch(settings, at, text):
    with pytest.raises(UsageError, match=text):
        branched(settings, at, decay=5)


def test_a_constant_run_can_branch_anywhere_after_its_warmup():
    run = Settings(lr=0.1, steps=100, schedule="constant")
    rates = [branched(run, 100, decay=4, form="linear").learning_rate(step) for step in (99, 100, 101, 103)]
    assert rates == pytest.approx([0.1, 0.1, 0.075, 0.025])


def test_what_cannot_be_branched_is_refused(tmp_path):
    job = workload("regression")
    train(job, job.defaults.replace(**WSD), out=tmp_path / "run")
    with pytest.raises(UsageError, match="no checkpoint in its stable phase"):
        branch(tmp_path / "run", decay=3, out=tmp_path / "out")
    with pytest.raises(UsageError, match="no checkpoint after 20 steps, only after: 40"):
        branch(tmp_path / "run", at=20, decay=3, out=tmp_path / "out")
    with pytest.raises(UsageError, match="a run from there needs more steps"):
        train(job, job.defaults.replace(steps=5), start=latest_checkpoint(tmp_path / "run"))
    with pytest.raises(UsageError, match="is of another workload"):
        train("tabular", start=latest_checkpoint(tmp_path / "run"))
    assert not (tmp_path / "out").exists()
