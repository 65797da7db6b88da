"""`forecast`: the prediction, its check, JSON, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

_COMMON = ["forecast", "digits-vit", "--lr=1e-3:1e-2", "--points=3", "--steps=12", "--workers=1", "--out=out"]


def test_a_forecast_is_made_and_checked(trimtab: Callable[..., Any]) -> None:
    # A threshold near the logits of twelve steps: the runs are as real as long ones.
    found = trimtab(*_COMMON, "--threshold=30", "--check")
    assert found.code == 0
    data = json.loads(Path("out/forecast.json").read_text(), parse_constant=pytest.fail)
    (forecast,), (check,) = data["forecasts"], data["checks"]
    assert f"attention_max_logit crosses 30 at lr {forecast['prediction']:.3g}" in found.out
    assert len(forecast["x"]) == 3
    assert len(check["lrs"]) == 8
    assert ("off by" in found.out) == (check["error_decades"] is not None)
    again = json.loads(trimtab(*_COMMON, "--threshold=30", "--check", "--json").out)
    assert again == data
    # The same runs say nothing of a threshold below all of them.
    none = trimtab(*_COMMON, "--threshold=1e-6", "--json")
    assert none.code == 1
    (forecast,) = json.loads(none.out)["forecasts"]
    assert forecast["reason"] == "a line needs at least 3 points, got 0"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--at-lr=0.1", "--check"], "goes without --at-width and --check"),
        (["--width=8;16"], "widths are whole numbers"),
        (["--lr=1"], "LOW:HIGH"),
        (["--degree=3"], "degree of a forecast is 1 or 2"),
        (["--threshold=nan"], "threshold of a forecast must be finite"),
        (["--at-lr=nan", "--width=16,32"], "--at-lr must be finite and above 0"),
        (["--at-lr=0.1", "--width=16"], "two or more widths"),
        (["--at-width=64"], "two or more widths"),
    ],
)
def test_wrong_use_is_refused(arguments: list[str], text: str, refused: Callable[..., str]) -> None:
    assert text in refused("forecast", "digits-vit", "--steps=2", *arguments)
    assert not Path("runs").exists()


def test_a_workload_without_attention_is_told_so(trimtab: Callable[..., Any]) -> None:
    found = trimtab("forecast", "digits-mlp", "--steps=4", "--points=2", "--workers=1")
    assert found.code == 2
    said = found.err.splitlines()[-1]
    assert said.startswith("trimtab: the runs have no signal 'attention_max_logit' above 0. Recorded: ")
    assert "grad_norm" in said
