"""One run as a job: the value that counts, its course, and what a divergence counts as."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from trimtab.bench import task
from trimtab.bench.cost import cost_job, measure
from trimtab.bench.runs import Ended, loaded, run, run_job
from trimtab.workloads import Settings, train, workload

MLP = task("digits-mlp")


def finished(settings: Settings, folder: Path, *, watch: bool = False, on: Any = MLP) -> Ended:
    job = run_job(on, settings, watch=watch)
    seen: list[int] = []
    found = run(job.arguments, folder / "run", lambda step, loss: seen.append(step))
    assert seen[: job.steps] == list(range(1, len(seen) + 1))
    assert not (folder / "run").exists()
    return Ended.from_json(found)


@pytest.fixture
def settings() -> Settings:
    return MLP.settings().replace(steps=20, seed=3)


def test_a_run_ends_as_training_does(settings: Settings, tmp_path: Path) -> None:
    found = finished(settings, tmp_path, watch=True)
    outcome = train("digits-mlp", settings)
    assert (found.value, found.initial, found.seed) == (outcome.loss, outcome.initial_loss, 3)
    assert found.steps == tuple(range(0, 21, 2))
    assert (found.course[0], found.course[-1]) == (found.initial, found.value)
    assert found.course[5] == pytest.approx(_loss_after(settings, 10))
    assert found.mechanism["grad_norm"] > 0
    assert Ended.from_json(found.to_json()) == found


def _loss_after(settings: Settings, steps: int) -> float:
    """The held-out loss in the middle of a run, from a loop of our own."""
    import torch

    job = workload("digits-mlp")
    model = job.model(settings.seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=0.0, betas=(settings.beta1, settings.beta2), weight_decay=settings.weight_decay
    )
    for step in range(steps):
        inputs, targets = job.batch(settings.seed, step, settings.batch_size)
        optimizer.param_groups[0]["lr"] = settings.learning_rate(step)
        optimizer.zero_grad()
        job.loss(model(inputs), targets).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
        optimizer.step()
    return job.evaluate(model)["loss"]


def test_a_run_that_diverges_counts_as_its_loss_at_initialisation(settings: Settings, tmp_path: Path) -> None:
    broken = settings.replace(optimizer="sgd", lr=1e30, clip=0)
    found = finished(broken, tmp_path)
    assert found.diverged
    assert found.value == found.loss == found.initial == found.course[-1]


def test_a_run_that_ends_worse_than_it_began_counts_as_its_loss_at_initialisation(
    settings: Settings, tmp_path: Path
) -> None:
    found = finished(settings.replace(lr=30.0, weight_decay=0.0), tmp_path)
    assert not found.diverged
    assert found.value == found.initial


def test_an_accuracy_of_a_diverged_run_is_0(tmp_path: Path) -> None:
    collapse = task("softmax-collapse")
    broken = collapse.settings(quick=True).replace(optimizer="sgd", lr=1e30, steps=4)
    found = finished(broken, tmp_path, on=collapse)
    assert (found.diverged, found.value) == (True, 0.0)
    assert found.loss == pytest.approx(4.6, abs=0.1)  # of log 97, the loss at initialisation


def test_the_same_run_has_the_same_name_and_another_point_another() -> None:
    settings = MLP.settings()
    assert run_job(MLP, settings, watch=False).key == run_job(MLP, settings, watch=False).key
    keys = {run_job(MLP, settings.replace(beta1=beta), watch=watch).key for beta in (0.8, 0.9) for watch in (0, 1)}
    assert len(keys) == 4


def test_the_cost_of_a_step_is_relative_and_measured_in_turns(tmp_path: Path) -> None:
    settings = MLP.settings()
    same = measure(cost_job(MLP, settings, settings).arguments, tmp_path, lambda step, loss: None)
    assert same["ratio"] == pytest.approx(1.0, rel=0.35)
    larger = settings.replace(batch_size=1024)
    found = measure(cost_job(MLP, settings, larger).arguments, tmp_path, lambda step, loss: None)
    assert found["ratio"] > 1.5


def test_the_cost_of_a_step_is_that_of_the_whole_run(tmp_path: Path) -> None:
    """A curriculum that is cheap at first is not charged its first steps alone, nor its last."""
    settings = MLP.settings().replace(batch_size=1024)
    job = loaded("digits-mlp")
    seen: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            job, "batch", lambda seed, step, size: seen.append(step) or type(job).batch(job, seed, step, size)
        )
        measure(cost_job(MLP, settings, settings).arguments, tmp_path, lambda step, loss: None)
    measured = sorted(set(seen) - {0})
    assert len(measured) == 8
    assert sum(measured) / 8 == pytest.approx(settings.steps / 2, rel=0.02)
    assert seen.count(measured[0]) == seen.count(measured[-1])
