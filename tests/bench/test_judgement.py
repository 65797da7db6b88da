"""Verdicts, speed-ups and profiles from measurements that are known."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats

from trimtab.bench import SUITE, Measured, judge, profiles
from trimtab.bench.speed import median_curve


def test_a_faster_arm_is_better_everywhere_and_by_its_rate(made: Callable[..., Measured]) -> None:
    base, own = made("adamw", 1.0, seeds=20, noise=0.01), made("lion", 1.2, noise=0.01, seed=1, cost=1.5)
    found = judge(own, base, SUITE)
    assert found.count("better") == len(SUITE) == len(found.tasks)
    assert found.steps.mean == pytest.approx(1.2, rel=0.05)
    assert found.steps.low < 1.2 < found.steps.high
    assert found.cpu.mean == pytest.approx(found.steps.mean / 1.5)
    assert found.steps.credible
    assert "look for a mistake" not in str(found.steps)
    for entry, task in zip(found.tasks, SUITE, strict=True):
        first, second = base.results[task.name].values[:10], own.results[task.name].values
        assert entry.pair.n == 10
        assert entry.pair.mean == pytest.approx(np.mean(np.array(second) - np.array(first)))
        assert entry.p >= stats.ttest_rel(second, first).pvalue * (1 - 1e-9)


def test_a_slower_arm_is_worse(made: Callable[..., Measured]) -> None:
    found = judge(made("lion", 0.8, noise=0.01, seed=1), made("adamw", 1.0, seeds=20, noise=0.01), SUITE)
    assert found.count("worse") == len(SUITE)
    assert found.steps.high < 1


def test_equal_arms_give_no_evidence_and_an_interval_around_1(made: Callable[..., Measured]) -> None:
    found = judge(made("lion", 1.0, noise=0.05, seed=5), made("adamw", 1.0, seeds=20, noise=0.05), SUITE)
    assert found.count("no evidence") == len(SUITE)
    assert found.steps.low < 1 < found.steps.high


def test_holm_withdraws_a_verdict_that_one_comparison_alone_would_give(made: Callable[..., Measured]) -> None:
    withdrawn = 0
    for seed in range(1, 25):
        found = judge(
            made("lion", 1.0, noise=0.05, seed=seed), made("adamw", 1.0, seeds=10, noise=0.05), SUITE, resamples=2
        )
        for entry in found.tasks:
            if entry.pair.verdict != "no evidence" and entry.verdict == "no evidence":
                withdrawn += 1
                assert entry.p > 0.05
            elif entry.verdict != "no evidence":
                assert entry.p <= 0.05
    assert withdrawn >= 3


def test_what_is_too_good_is_flagged(made: Callable[..., Measured]) -> None:
    found = judge(made("lion", 2.0, noise=0.01, seed=1), made("adamw", 1.0, seeds=20, noise=0.01), SUITE)
    assert not found.steps.credible
    assert "above 1.4: look for a mistake first" in str(found.steps)


def test_the_quick_profile_withholds_verdicts(made: Callable[..., Measured]) -> None:
    found = judge(made("lion", 2.0, budget="quick"), made("adamw", 1.0, budget="quick"), SUITE, resamples=2)
    assert {entry.verdict for entry in found.tasks} == {""}


def test_a_task_that_nobody_learns_has_a_verdict_but_no_speed(made: Callable[..., Measured]) -> None:
    base, own = made("adamw", 0.02, seeds=20), made("lion", 0.02)
    found = judge(own, base, SUITE)
    assert all(entry.speed_steps is None for entry in found.tasks)
    assert (found.steps.tasks, math.isnan(found.steps.mean)) == (0, True)
    assert str(found.steps) == "no task to measure it on"
    assert profiles({"adamw": base, "lion": own}, SUITE)["contenders"][0]["ratios"] == {}
    json.dumps(found.to_json(), allow_nan=False)


def test_a_task_that_is_left_out_is_not_compared(made: Callable[..., Measured]) -> None:
    base, own = made("adamw", 1.0, seeds=20), made("lion", 1.2)
    kept = {name: result for name, result in own.results.items() if name != "digits-mlp"}
    part = dataclasses.replace(own, results=kept, left_out={"digits-mlp": "nothing to change"})
    assert [entry.task for entry in judge(part, base, SUITE, resamples=2).tasks] == list(kept)
    ratios = profiles({"adamw": base, "lion": part}, SUITE)["contenders"][1]["ratios"]
    assert ratios["digits-mlp"] is None  # never arrives


def test_profiles_are_ratios_of_times_to_the_references_median(made: Callable[..., Measured]) -> None:
    base, own = made("adamw", 1.0, seeds=20), made("lion", 1.25, cost=2.0)
    found = profiles({"adamw": base, "lion": own}, SUITE)
    by_label = {entry["label"]: entry for entry in found["contenders"]}
    assert all(ratio == 1.0 for ratio in by_label["lion"]["ratios"].values())
    assert by_label["adamw"]["ratios"]["digits-vit"] == pytest.approx(1.25, rel=0.02)
    assert by_label["adamw"]["times"]["digits-vit"] == median_curve(base.results["digits-vit"].runs)[0][-1]
    in_time = {entry["label"]: entry for entry in profiles({"adamw": base, "lion": own}, SUITE, cpu=True)["contenders"]}
    assert in_time["lion"]["ratios"]["digits-vit"] == pytest.approx(2 / 1.25, rel=0.02)


def test_measurements_survive_json(made: Callable[..., Measured]) -> None:
    own = made("lion", 1.2, noise=0.01)
    assert Measured.from_json(json.loads(json.dumps(own.to_json()))) == own
