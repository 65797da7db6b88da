"""A Card's experiments, run again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from trimtab.card import Card, Experiment, Paper
from trimtab.compare import reproduce
from trimtab.errors import UsageError


def _card(*experiments: Experiment) -> Card:
    return Card(
        name="made-up",
        room="schedule",
        summary="a card of this test",
        paper=Paper("None", 2000),
        equation="x = x",
        claim="a lower loss",
        acts_on="settings",
        entry="nowhere:nothing",
        experiments=experiments,
    )


def test_experiments_become_paired_comparisons(tmp_path: Path) -> None:
    first = Experiment("digits-mlp", "lr=0.00001,steps=30", "lr=0.01,steps=30", mechanism="grad_norm", seeds=9)
    second = Experiment("digits-mlp", "lr=0.01,steps=30", "lr=0.00001,steps=30", "accuracy", higher_is_better=True)
    found = reproduce(_card(first, second), folder=tmp_path, seeds=2, workers=1)
    assert [entry.experiment for entry in found] == [first, second]
    assert [entry.verdict.n for entry in found] == [2, 2]
    assert [entry.verdict.mean < 0 for entry in found] == [True, True]
    treated, baseline = (found[0].comparison.results[place].values("grad_norm") for place in (1, 0))
    assert found[0].mechanism is not None
    assert found[0].mechanism.mean == pytest.approx(sum(treated) / 2 - sum(baseline) / 2)
    assert found[1].mechanism is None
    data = json.loads((tmp_path / "reproduction.json").read_text(), parse_constant=pytest.fail)
    assert (data["kind"], data["method"], len(data["results"])) == ("reproduction", "made-up", 2)
    assert data["results"][0]["verdict"] == found[0].verdict.to_json()
    # The second experiment swaps the arms of the first: its runs are there already.
    assert len(list((tmp_path / "jobs").glob("*.json"))) == 4
    for number in (1, 2):
        written = json.loads((tmp_path / f"experiment-{number}.json").read_text())
        assert [arm["label"] for arm in written["arms"]] == [
            found[number - 1].experiment.baseline,
            found[number - 1].experiment.treated,
        ]


def test_a_card_without_experiments_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="states no experiment"):
        reproduce(_card(), folder=tmp_path)


def test_an_optimizers_experiment_is_reproduced_with_its_state_beside_the_loss(tmp_path: Path) -> None:
    experiment = Experiment(
        "digits-mlp",
        "adamw,lr=0.003,steps=10,spikes=0.2",
        "trimtab-adamw,lr=0.003,steps=10,spikes=0.2,state=bf16",
        mechanism="state_bytes_per_parameter",
    )
    [found] = reproduce(_card(experiment), folder=tmp_path, seeds=2, workers=1)
    assert found.verdict.n == 2
    assert found.mechanism is not None
    assert found.mechanism.mean == pytest.approx(-4, abs=0.1)
    treated = found.comparison.results[1].outcomes[0].settings
    assert (treated["optimizer"], treated["options"]) == ("trimtab-adamw", {"state": "bf16"})
    assert all("trimtab-adamw" in Path(outcome.folder or "").name for outcome in found.comparison.results[1].outcomes)
