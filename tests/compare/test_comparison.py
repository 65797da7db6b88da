"""Comparisons of real runs: paired, complete, repeated never, and equal to training alone."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
from scipy import stats

from trimtab.compare import Arm, ArmResult, Comparison, Progress, compare
from trimtab.compare.training import final_loss, prepared, seed_list, training_job
from trimtab.errors import UsageError
from trimtab.record import Run
from trimtab.workloads import Outcome, Settings, train, workload

_ARMS = ["lr=0.003", "lr=0.03", "sgd,lr=1e6,momentum=0"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("compare")


@pytest.fixture(scope="module")
def result(folder: Path) -> Comparison:
    return compare("digits-mlp", _ARMS, folder=folder, seeds=3, steps=20, workers=2)


def test_runs_equal_training_alone(result: Comparison) -> None:
    job = workload("digits-mlp")
    for arm in result.results[:2]:
        for seed in (0, 2):
            alone = train(job, job.defaults.replace(lr=arm.arm.settings.lr, steps=20, seed=seed))
            assert arm.outcomes[seed].loss == alone.loss


def test_pairs_equal_scipy(result: Comparison) -> None:
    first, second = (result.results[place].values("loss") for place in (0, 1))
    expected = stats.ttest_rel(second, first)
    interval = expected.confidence_interval(0.95)
    found = result.pairs["lr=0.03"]
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
    assert found.verdict == ("better" if expected.pvalue < 0.05 else "no evidence")


def test_a_diverged_run_counts_as_its_loss_at_initialisation(result: Comparison) -> None:
    lost = result.results[2]
    for seed, (value, outcome) in enumerate(zip(lost.values("loss"), lost.outcomes, strict=True)):
        assert outcome.diverged or outcome.loss > outcome.initial_loss
        assert value == result.baseline.outcomes[seed].initial_loss
    assert result.pairs[_ARMS[2]].n == 3
    assert result.pairs[_ARMS[2]].verdict == "worse"


def test_every_run_is_recorded(result: Comparison, folder: Path) -> None:
    assert len(result.runs) == 9
    for path in result.runs:
        assert path.parent == folder / "runs"
        with Run(path) as run:
            assert run.meta["workload"] == "digits-mlp"
            assert len(run.series("loss")) >= 1


def test_nothing_is_repeated(result: Comparison, folder: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (folder / "jobs").glob("*.json")}
    seen: list[Progress] = []
    again = compare("digits-mlp", _ARMS, folder=folder, seeds=3, steps=20, progress=seen.append)
    assert again.to_json() == result.to_json()
    assert [(entry.done, entry.steps_done) for entry in seen] == [(9, 180)]
    assert {path: path.stat().st_mtime_ns for path in (folder / "jobs").glob("*.json")} == before


def test_json_is_strict_and_complete(result: Comparison, folder: Path) -> None:
    data = json.loads((folder / "comparison.json").read_text(), parse_constant=pytest.fail)
    assert data["kind"] == "comparison"
    assert [arm["label"] for arm in data["arms"]] == _ARMS
    assert [[outcome["seed"] for outcome in arm["outcomes"]] for arm in data["arms"]] == [[0, 1, 2]] * 3
    assert [(pair["arm"], pair["baseline"]) for pair in data["pairs"]] == [(arm, _ARMS[0]) for arm in _ARMS[1:]]
    assert {pair["verdict"] for pair in data["pairs"]} <= {"better", "no evidence", "worse"}


def test_other_metrics_of_the_same_runs(result: Comparison) -> None:
    accuracy = result.paired("accuracy", higher_is_better=True)
    expected = [outcome.metrics.get("accuracy", 0.0) for outcome in result.results[1].outcomes]
    assert result.results[1].values("accuracy", higher_is_better=True) == expected
    assert set(accuracy) == set(_ARMS[1:])
    assert result.baseline.values("grad_norm") == [out.mechanism["grad_norm"] for out in result.baseline.outcomes]
    with pytest.raises(UsageError, match="no metric 'perplexity'"):
        result.paired("perplexity")


def test_a_metric_that_a_diverged_run_lacks_is_the_worst_there_is() -> None:
    arm = Arm("a", Settings(lr=0.1, steps=1))
    lost = Outcome("w", {"seed": 0}, 2.0, {}, 2.0, True, 3, 0.1)
    assert ArmResult(arm, (lost,)).values("accuracy", higher_is_better=True) == [0.0]
    assert ArmResult(arm, (lost,)).values("error") == [math.inf]
    assert final_loss(lost) == 2.0
    assert final_loss(dataclasses.replace(lost, diverged=False, loss=50.0)) == 2.0
    assert final_loss(dataclasses.replace(lost, diverged=False, loss=1.0)) == 1.0


@pytest.mark.parametrize(
    ("arms", "options", "match"),
    [
        (["lr=0.1"], {}, "two or more different arms"),
        ([], {}, "two or more different arms, got none"),
        (["lr=0.1", "lr=0.1"], {}, "two or more different arms"),
        (["lr=0.1", "lr=0.1,with=qk-norm"], {}, "qk-norm: no attention to change"),
        (["lr=0.1", "lr=0.2,seed=3"], {}, "sets a seed"),
        (["lr=0.1", "lr=-1"], {}, "lr should be greater than 0"),
        (["lr=0.1", "batch_size=100000"], {}, "exceeds the"),
        (["lr=0.1", "lr=0.2"], {"seeds": 0}, "1 to 1000 seeds, got 0"),
        (["lr=0.1", "lr=0.2"], {"seeds": [1, 1]}, "different seeds"),
        (["lr=0.1", "lr=0.2"], {"steps": 0}, "steps should be greater"),
        (["lr=0.1", "lr=0.2"], {"text": "/nowhere"}, "takes no text"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_runs(
    arms: list[str], options: dict[str, object], match: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=match):
        compare("digits-mlp", arms, folder=tmp_path / "out", **options)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_unknown_workload() -> None:
    with pytest.raises(UsageError, match="Did you mean 'digits-mlp'"):
        prepared("digits-mpl")


def test_the_key_follows_from_what_the_result_depends_on() -> None:
    job = prepared("digits-mlp")
    settings = job.defaults
    key = training_job(job, settings).key
    assert training_job(prepared("digits-mlp"), settings.replace()).key == key
    assert training_job(job, settings.replace(lr=0.5)).key != key
    assert training_job(job, settings.replace(clip=0.25)).key != key
    assert training_job(job, settings.replace(seed=1)).key != key


def test_seed_lists() -> None:
    assert seed_list(3) == (0, 1, 2)
    assert seed_list([5, 3]) == (5, 3)
