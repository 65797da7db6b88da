"""`bench`: verdicts, tables and a plot for people, JSON for programs, a page; runs are made up, the way is not."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from trimtab.compare import Job


def made_up(jobs: Sequence[Job]) -> list[dict[str, Any]]:
    """Results by formula, in place of training: lion ends lower than adamw, adamw lower than sgd."""
    found: list[dict[str, Any]] = []
    for job in jobs:
        if job.task.endswith(":measure"):
            found.append({"ratio": 1.1})
            continue
        settings = job.arguments["settings"]
        gain = {"lion": 0.9, "adamw": 1.0, "sgd": 1.2}[settings["optimizer"]]
        loss = gain * (0.2 + 0.05 * abs(math.log10(settings["lr"] / 0.01)) + 0.001 * (settings["seed"] % 7))
        lost = settings["lr"] > 5
        value = 2.3 if lost else loss
        course = [2.3 if lost else 2.3 - (2.3 - loss) * part / 10 for part in range(11)]
        steps = [settings["steps"] * part // 10 for part in range(11)]
        watched = {"attention_max_logit": 3.5} if job.arguments["watch"] else {}
        found.append(
            {
                "seed": settings["seed"],
                "value": value,
                "loss": value,
                "initial": 2.3,
                "diverged": lost,
                "steps": steps,
                "course": course,
                "cpu_seconds_per_step": 0.001,
                "mechanism": watched,
            }
        )
    return found


@pytest.fixture
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Results are made up."""
    monkeypatch.setattr("trimtab.bench.benchmark.runner", lambda folder, **options: made_up)


@pytest.mark.usefixtures("quickly")
def test_prints_verdicts_and_writes_what_it_found(trimtab: Callable[..., Any]) -> None:
    Path("out").mkdir()
    common = ["bench", "lion", "--tune-baselines", "--task=digits-vit", "--task=digits-mlp", "--out=out"]
    found = trimtab(*common, "--report=bench.html")
    assert found.code == 0, found.err
    flat = " ".join(found.out.split())
    assert flat.count("better (n=10)") == 4  # two tasks, two baselines
    for text in (
        "lion against adamw, both tuned over 40 points",
        "lion against sgd",
        "speed-up in steps, geometric mean: 1.",
        "credible over a tuned AdamW: 1 to 1.4",
        "Performance profile",
        "largest attention logit",
        "o adamw + sgd x lion",
    ):
        assert text in flat, text
    page = Path("bench.html").read_text()
    for text in ("Benchmark of lion", "Against adamw", "verdict-better", "Performance profile", "score", "beta1"):
        assert text in page
    assert "<svg" in page
    assert "style=" not in page.partition("<body>")[2].partition("<script")[0]  # the page's policy forbids it
    again = trimtab(*common, "--json")
    written = json.loads(Path("out/bench.json").read_text(), parse_constant=pytest.fail)
    assert {"kind": "bench", **json.loads(again.out, parse_constant=pytest.fail)} == written
    assert written["baselines"]["sgd"]["results"][0]["diverged_points"] > 0


@pytest.mark.usefixtures("quickly")
def test_the_quick_profile_says_that_it_is_not_the_protocol(trimtab: Callable[..., Any]) -> None:
    Path("out").mkdir()
    common = ["bench", "lion", "--quick", "--tune-baselines", "--task=digits-mlp", "--out=out"]
    found = trimtab(*common, "--report=bench.html")
    assert "quick: not the protocol, verdicts are withheld" in found.out
    assert "better" not in found.out
    assert "this is not the protocol" in Path("bench.html").read_text()


@pytest.mark.usefixtures("quickly")
def test_baselines_alone(trimtab: Callable[..., Any]) -> None:
    Path("out").mkdir()
    found = trimtab("bench", "--tune-baselines", "--task=digits-mlp", "--out=out", "--report=bench.html")
    assert found.code == 0
    assert "adamw: what tuning found" in found.out
    assert " against " not in found.out
    assert "Benchmark of baselines" in Path("bench.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["bench", "lion", "--task=digits-mlp"], "run trimtab bench --tune-baselines --out runs/bench first"),
        (["bench", "lion", "--task=digits-mlp", "--quick"], "--tune-baselines --quick --out runs/bench first"),
        (["bench"], "give an arm to measure"),
        (["bench", "--with=qk-norm"], "belong to an arm"),
        (["bench", "adamw"], "is a baseline itself"),
        (["bench", "lyon"], "Did you mean 'lion'?"),
        (["bench", "lion", "--with=lion"], "lion is an optimizer"),
        (["bench", "lion", "--lr=1"], "LOW:HIGH"),
        (["bench", "lion", "--task=groking"], "Did you mean 'grokking'?"),
        (["bench", "lion,lr=0.1"], "the benchmark tunes it"),
        (["bench", "lion", "--tune-baselines", "--workers=0", "--task=digits-mlp"], "workers must be at least 1"),
        (["bench", "adamw", "--with=qk-norm", "--task=digits-mlp"], "runs on no task"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], text: str, refused: Callable[..., str]) -> None:
    assert text in refused(*arguments)
