"""The whole way on one small task: baselines are asked for, kept and not repeated; a contender gets the same."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest

from trimtab.bench import FULL, QUICK, Benchmark, Contender, bench, tasks
from trimtab.bench.baselines import kept, tuned
from trimtab.bench.protocol import TUNING_SEED, Point, measure, possible_tasks, score
from trimtab.compare import Job, paired
from trimtab.errors import UsageError

MLP = tasks(["digits-mlp"])
ONLY = ["digits-mlp"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bench")


@pytest.fixture(scope="module")
def result(folder: Path) -> Benchmark:
    return bench("lion", folder=folder, only=ONLY, quick=True, tune_baselines=True, workers=1)


def test_everyone_gets_the_same(result: Benchmark) -> None:
    assert list(result.measured) == ["adamw", "sgd", "lion"]
    for measured in result.measured.values():
        found = measured.results["digits-mlp"]
        assert len(found.points) == QUICK.points
        assert [run.seed for run in found.runs] == [0, 1]
        values = [point.value for point in found.points]
        assert found.points[found.best].value == min(values)
        assert found.settings["lr"] == found.points[found.best].at["lr"]


def test_the_judgement_is_that_of_the_runs(result: Benchmark) -> None:
    for name, judgement in result.judgements.items():
        base, own = (found.results["digits-mlp"].values for found in (result.baselines[name], result.measured["lion"]))
        assert judgement.tasks[0].pair == paired(base, own)
        assert judgement.tasks[0].verdict == ""  # quick


def test_results_are_written_as_strict_json(result: Benchmark, folder: Path) -> None:
    written = json.loads((folder / "bench.json").read_text(), parse_constant=pytest.fail)
    assert written == {"kind": "bench", **json.loads(json.dumps(result.to_json(), allow_nan=False))}
    assert written["protocol"] == "quick"


def test_tuned_baselines_are_kept_and_nothing_is_run_twice(result: Benchmark, folder: Path) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in (folder / "jobs").glob("*.json")}
    assert kept(folder, MLP, QUICK) == result.baselines
    assert bench("lion", folder=folder, only=ONLY, quick=True) == result
    assert {path.name: path.stat().st_mtime_ns for path in (folder / "jobs").glob("*.json")} == before


def test_missing_baselines_are_asked_for(result: Benchmark, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"not tuned in .*: run trimtab bench --tune-baselines --quick --out .* first"):
        bench("lion", folder=tmp_path, only=ONLY, quick=True)
    with pytest.raises(UsageError, match=r"--tune-baselines --out .* first"):  # the quick ones are not the protocol's
        bench("lion", folder=folder, only=ONLY)
    with pytest.raises(UsageError, match="not tuned"):  # nor those of another task
        bench("lion", folder=folder, only=["digits-cnn"], quick=True)


def test_refused_before_anything_is_run(tmp_path: Path) -> None:
    for arm, text in (("adamw", "a baseline itself"), (None, "give an arm"), ("lyon", "unknown optimizer 'lyon'")):
        with pytest.raises(UsageError, match=text):
            bench(arm, folder=tmp_path / "none", quick=True, tune_baselines=arm is not None)
    assert not (tmp_path / "none").exists()


def test_an_arm_is_left_out_where_its_remedy_has_nothing_to_change() -> None:
    contender = Contender.parse("adamw", remedies=["qk-norm"])
    possible, left_out = possible_tasks(contender, tasks(["attention-growth", "digits-mlp"]), QUICK)
    assert [task.name for task in possible] == ["attention-growth"]
    assert "no attention to change" in left_out["digits-mlp"]
    with pytest.raises(UsageError, match="runs on no task"):
        possible_tasks(contender, MLP, QUICK)


def test_an_arm_is_left_out_where_its_curriculum_does_not_fit_the_data() -> None:
    contender = Contender.parse("adamw", remedies=["length-warmup"])
    possible, left_out = possible_tasks(contender, tasks(["heavy-tailed", "digits-mlp"]), QUICK)
    assert [task.name for task in possible] == ["heavy-tailed"]
    assert "needs token batches" in left_out["digits-mlp"]


def test_an_arm_whose_tuning_would_go_where_it_cannot_is_refused_before_baselines_are_tuned(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="more than the 300 steps"):
        bench("adamw,schedule=wsd,schedule.decay=0.9", folder=tmp_path / "none", only=ONLY, tune_baselines=True)
    assert not (tmp_path / "none").exists()


def made_up(jobs: list[Job]) -> list[dict]:
    """Results by formula, in place of training: the best learning rate is 0.01, other seeds add a little."""
    found = []
    for job in jobs:
        if job.task.endswith(":measure"):
            found.append({"ratio": 1.25})
            continue
        settings = job.arguments["settings"]
        loss = 0.1 + math.log10(settings["lr"] / 0.01) ** 2 + 0.001 * (settings["seed"] % 7)
        lost = settings["lr"] > 0.05
        value = 2.3 if lost else loss
        found.append(
            {
                "seed": settings["seed"],
                "value": value,
                "loss": value,
                "initial": 2.3,
                "diverged": lost,
                "steps": [0, 150, 300],
                "course": [2.3, 1.0, value],
                "cpu_seconds_per_step": 0.001,
                "mechanism": {"grad_norm": 1.0} if job.arguments["watch"] else {},
            }
        )
    return found


def test_the_full_protocol_tunes_over_40_points_at_a_seed_of_its_own() -> None:
    seen: list[Job] = []

    def watched(jobs: list[Job]) -> list[dict]:
        seen.extend(jobs)
        return made_up(jobs)

    reference = tuned(MLP, FULL, made_up)["adamw"]
    found = measure(Contender.parse("lion"), MLP, FULL, watched, seeds=FULL.seeds, reference=reference)
    result = found.results["digits-mlp"]
    seeds = [job.arguments["settings"]["seed"] for job in seen if "settings" in job.arguments]
    assert seeds == [TUNING_SEED] * 40 + list(range(10))
    assert (len(reference.results["digits-mlp"].runs), len(result.runs), result.cost) == (20, 10, 1.25)
    closest = min(result.points, key=lambda point: abs(math.log10(point.at["lr"] / 0.01)))
    assert result.points[result.best] == closest
    wide = dataclasses.replace(found.contender, lr=(1e-4, 1e-1))
    lost = measure(wide, MLP, FULL, made_up, seeds=2).results["digits-mlp"]
    assert lost.diverged_points == sum(point.at["lr"] > 0.05 for point in lost.points) > 0


def test_among_equal_accuracies_the_loss_decides() -> None:
    grokking = tasks(["grokking"])[0]
    points = [Point({}, 0.9, 0.5, False), Point({}, 1.0, 0.2, False), Point({}, 1.0, 0.1, False)]
    assert min(points, key=lambda point: score(grokking, point)) == points[2]
