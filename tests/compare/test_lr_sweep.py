"""Sweeps of real runs: curves, S and S+ from the losses themselves, resumed without repeats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trimtab.compare import Size, Sweep, sweep
from trimtab.errors import UsageError

_GRID = [1e-3, 1e-1, 1e7]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sweep")


@pytest.fixture(scope="module")
def result(folder: Path) -> Sweep:
    return sweep("digits-mlp", _GRID, folder=folder, remedies=[["lower-lr"]], seeds=2, steps=15, workers=1)


def test_curves_hold_the_runs_of_their_settings(result: Sweep) -> None:
    assert [curve.arm.label for curve in result.curves] == ["without remedy", "lower-lr"]
    for curve in result.curves:
        for lr, row in zip(result.lrs, curve.outcomes, strict=True):
            assert [(out.settings["lr"], out.settings["seed"]) for out in row] == [(lr, 0), (lr, 1)]
            assert all(out.settings["remedies"] == list(curve.arm.settings.remedies) for out in row)


def test_sensitivity_equals_numpy(result: Sweep) -> None:
    for curve in result.curves:
        initial = np.array([[out.initial_loss for out in row] for row in curve.outcomes])
        raw = np.array([[np.inf if out.diverged else out.loss for out in row] for row in curve.outcomes])
        capped = np.minimum(raw, initial)
        excess = capped - capped.min(axis=0)
        best = capped.argmin(axis=0)
        plus = [excess[start:, seed].mean() for seed, start in enumerate(best)]
        assert curve.s == pytest.approx(excess.mean())
        assert curve.s_plus == pytest.approx(np.mean(plus))
        assert curve.mean_losses == pytest.approx(list(capped.mean(axis=1)))


def test_the_curves_are_paired_by_seed(result: Sweep) -> None:
    found = result.pairs["lower-lr"]
    assert found["S"].n == found["S_plus"].n == 2
    difference = result.curves[1].s - result.curves[0].s
    assert found["S"].mean == pytest.approx(difference)


def test_json_is_strict_and_nothing_is_repeated(result: Sweep, folder: Path) -> None:
    data = json.loads((folder / "sweep.json").read_text(), parse_constant=pytest.fail)
    assert (data["kind"], data["lrs"]) == ("sweep", _GRID)
    for curve in data["curves"]:
        assert np.shape(curve["losses"]) == (3, 2)
        assert {"label", "S", "S_plus", "best_lr", "initial_loss", "mean"} <= set(curve)
    before = {path: path.stat().st_mtime_ns for path in (folder / "jobs").glob("*.json")}
    assert len(before) == 12
    # A wider sweep takes what is there: only the new points run.
    wider = sweep("digits-mlp", [*_GRID, 0.5], folder=folder, remedies=[["lower-lr"]], seeds=2, steps=15, workers=1)
    after = {path: path.stat().st_mtime_ns for path in (folder / "jobs").glob("*.json")}
    assert len(after) == 16
    assert {path: after[path] for path in before} == before
    assert wider.lrs == (1e-3, 1e-1, 0.5, 1e7)


def test_arms_have_curves_of_their_own(tmp_path: Path) -> None:
    found = sweep(
        "digits-mlp",
        [1e-3, 1e-2],
        folder=tmp_path,
        arms=["adamw", "trimtab-sgd,momentum=0.5"],
        remedies=[["lower-lr"]],
        steps=3,
        workers=1,
    )
    assert [curve.arm.label for curve in found.curves] == ["adamw", "trimtab-sgd,momentum=0.5", "lower-lr"]
    assert set(found.pairs) == {"trimtab-sgd,momentum=0.5", "lower-lr"}
    ours = found.curves[1].outcomes[1][0].settings
    assert (ours["optimizer"], ours["momentum"], ours["lr"]) == ("trimtab-sgd", 0.5, 1e-2)
    assert found.curves[2].outcomes[0][0].settings["optimizer"] == "adamw"


@pytest.mark.parametrize(
    ("arms", "match"),
    [
        (["adamw,lr=0.1"], "sets a learning rate"),
        (["adamw", "adamw"], "given twice"),
        (["trimtab-adamw,state=9bit"], "unknown state format"),
    ],
)
def test_wrong_arms_of_sweeps_are_refused(arms: list[str], match: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=match):
        sweep("digits-mlp", [0.1], folder=tmp_path / "out", arms=arms, steps=2)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("lrs", "remedies", "match"),
    [
        ([], [], "different learning rates, got none"),
        ([0.1, 0.1], [], "different learning rates"),
        ([0.1, -0.1], [], "lr should be greater than 0"),
        ([0.1], [["lower-lr"], ["lower-lr"]], "given twice"),
        ([0.1], [["qk-norm"]], "no attention to change"),
        ([0.1], [["qk-nrom"]], "Did you mean 'qk-norm'"),
    ],
)
def test_wrong_sweeps_are_refused(lrs: list[float], remedies: list[list[str]], match: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=match):
        sweep("digits-mlp", lrs, folder=tmp_path / "out", remedies=remedies, steps=2)
    assert not (tmp_path / "out").exists()


def test_every_size_has_its_curves_and_its_own_baseline(tmp_path: Path) -> None:
    common = {"remedies": [["lower-lr"]], "steps": 3, "workers": 1}
    found = sweep("digits-mlp", [1e-3, 1e-2], folder=tmp_path, widths=[16, 8], **common)
    assert [curve.arm.label for curve in found.curves] == [
        "without remedy, width 8",
        "lower-lr, width 8",
        "without remedy, width 16",
        "lower-lr, width 16",
    ]
    assert (found.widths, found.depths) == ((8, 16), ())
    assert [curve.side for curve in found.at(Size(16))] == ["without remedy", "lower-lr"]
    assert {out.settings["width"] for curve in found.at(Size(8)) for row in curve.outcomes for out in row} == {8}
    # A wider model begins elsewhere: the runs are those of their sizes.
    assert found.curves[0].outcomes[0][0].initial_loss != found.curves[2].outcomes[0][0].initial_loss
    data = json.loads((tmp_path / "sweep.json").read_text())
    assert {(pair["arm"], pair["baseline"]) for pair in data["pairs"]} == {
        ("lower-lr, width 8", "without remedy, width 8"),
        ("lower-lr, width 16", "without remedy, width 16"),
    }
    assert [(curve["side"], curve["width"], curve["depth"]) for curve in data["curves"]][2] == (
        "without remedy",
        16,
        None,
    )


def test_the_own_size_is_not_trained_again(tmp_path: Path) -> None:
    plain = sweep("digits-mlp", [1e-3], folder=tmp_path, steps=3, workers=1)
    sized = sweep("digits-mlp", [1e-3], folder=tmp_path, widths=[128], depths=[2], steps=3, workers=1)
    assert len(list((tmp_path / "jobs").glob("*.json"))) == 1
    assert sized.curves[0].arm.label == "without remedy, width 128, depth 2"
    assert sized.curves[0].losses == plain.curves[0].losses


@pytest.mark.parametrize(
    ("sizes", "match"),
    [
        ({"widths": [0]}, "a width is a whole number of at least 1, got 0"),
        ({"widths": [8, 8]}, "different widths, got 8 twice"),
        ({"depths": [1.5]}, "a depth is a whole number"),
        ({"widths": [8], "arms": ["adamw,width=4"]}, "sets a width: the sweep does"),
        ({"depths": [3], "workload": "digits-cnn"}, "has no depth"),
    ],
)
def test_wrong_sizes_are_refused(sizes: dict[str, Any], match: str, tmp_path: Path) -> None:
    workload = sizes.pop("workload", "digits-mlp")
    with pytest.raises(UsageError, match=match):
        sweep(workload, [0.1], folder=tmp_path / "out", steps=2, **sizes)
    assert not (tmp_path / "out").exists()
