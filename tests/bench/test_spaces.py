"""Search spaces: the same box for everyone, filled evenly, and what an arm fixes is left alone."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import qmc

from trimtab.bench import SUITE, Contender, task
from trimtab.bench.spaces import LR, LR_OF
from trimtab.errors import UsageError

MLP, COLLAPSE = task("digits-mlp"), task("softmax-collapse")


def names(arm: str, on: str = "digits-mlp") -> list[str]:
    return [part.name for part in Contender.parse(arm).dimensions(task(on))]


def test_every_range_of_learning_rates_spans_three_decades() -> None:
    for low, high in (LR, *LR_OF.values()):
        assert math.log10(high / low) == pytest.approx(3)


def test_each_optimizer_is_tuned_in_what_it_takes() -> None:
    assert names("adamw") == ["lr", "decay", "beta1", "beta2", "warmup"]
    assert names("sgd") == ["lr", "decay", "momentum", "warmup"]
    assert names("muon") == ["lr", "decay", "beta1", "beta2", "momentum", "warmup"]
    assert names("schedule-free") == ["lr", "decay", "beta1", "beta2", "warmup"]
    assert names("ranger21") == ["lr", "decay", "beta1", "beta2"]  # its own warm-up
    assert "decay" not in names("adamw", "softmax-collapse")


def test_what_the_arm_fixes_is_not_tuned() -> None:
    assert names("adamw,beta2=0.99,warmup=0.1,weight_decay=0") == ["lr", "beta1"]
    settings = Contender.parse("adamw,beta2=0.5").at(MLP, {"lr": 0.1, "decay": 1.0, "beta1": 0.1, "warmup": 0.0})
    assert settings.beta2 == 0.5


def test_points_lie_in_the_box_and_fill_it_better_than_chance() -> None:
    contender = Contender.parse("adamw")
    dimensions = contender.dimensions(MLP)
    points = contender.points(MLP, 40)
    assert points == Contender.parse("adamw").points(MLP, 40)
    shares = np.empty((40, len(dimensions)))
    for column, part in enumerate(dimensions):
        values = np.array([point[part.name] for point in points])
        assert values.min() >= part.low * 0.999
        assert values.max() <= part.high * 1.001
        shares[:, column] = np.log(values / part.low) / np.log(part.high / part.low) if part.log else values / part.high
        # Each fifth of every range has at least four of the forty points.
        assert np.histogram(shares[:, column].clip(0, 1), bins=5, range=(0, 1))[0].min() >= 4
    random = [qmc.discrepancy(np.random.default_rng(seed).random(shares.shape)) for seed in range(20)]
    assert qmc.discrepancy(shares.clip(0, 1)) < min(random)


def test_a_point_becomes_settings() -> None:
    point = {"lr": 0.002, "decay": 3.0, "beta1": 0.05, "beta2": 0.004, "warmup": 0.15}
    settings = Contender.parse("adamw").at(MLP, point)
    assert settings.lr * settings.weight_decay * settings.steps == pytest.approx(3.0, rel=1e-3)
    assert (settings.beta1, settings.beta2, settings.warmup) == (0.95, 0.996, 0.15)
    assert Contender.parse("lion").at(COLLAPSE, {"lr": 1e-3, "beta1": 0.1}).weight_decay == 0


def test_total_decay_is_what_decoupled_decay_takes_from_the_logarithm_of_a_weight() -> None:
    import torch

    settings = Contender.parse("adamw").at(MLP, {"lr": 0.001, "decay": 0.5})
    weight = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))
    optimizer = torch.optim.AdamW([weight], lr=settings.lr, weight_decay=settings.weight_decay)
    for _ in range(settings.steps):
        weight.grad = torch.zeros_like(weight)
        optimizer.step()
    assert float(weight.detach().log()) == pytest.approx(-0.5, rel=0.01)


def test_an_arm_begins_with_its_optimizer() -> None:
    for arm in ("optimizer=lion", "beta2=0.9", "with=z-loss"):
        with pytest.raises(UsageError, match="unknown optimizer"):
            Contender.parse(arm)


def test_blanks_in_an_arm_mean_nothing() -> None:
    found = Contender.parse(" schedule-free , schedule=cosine")
    assert found == Contender.parse("schedule-free,schedule=cosine")
    assert found.settings(MLP).schedule == "cosine"


def test_own_schedules_come_with_their_optimizers() -> None:
    assert Contender.parse("schedule-free").settings(MLP).schedule == "constant"
    assert Contender.parse("schedule-free,schedule=cosine").settings(MLP).schedule == "cosine"
    assert Contender.parse("lion").settings(MLP).schedule == "cosine"


def test_remedies_join_the_arm() -> None:
    contender = Contender.parse("adamw", remedies=["qk-norm"])
    assert contender.arm == "adamw,with=qk-norm"
    assert contender.settings(SUITE[0]).remedies == ("qk-norm",)


def test_the_edge_of_the_range_of_learning_rates_is_noticed() -> None:
    contender = Contender.parse("adamw", lr=(1e-4, 1e-1))
    assert contender.lr_at_edge({"lr": 0.09})
    assert contender.lr_at_edge({"lr": 1.1e-4})
    assert not contender.lr_at_edge({"lr": 0.01})


@pytest.mark.parametrize(
    ("arm", "options", "text"),
    [
        ("adamw,lr=0.1", {}, "the benchmark tunes it"),
        ("adamw,steps=5", {}, "the suite fixes it"),
        ("adamw,seed=5", {}, "the suite fixes it"),
        ("adamw", {"lr": (1.0, 0.1)}, "rises from above 0"),
        ("adamw", {"lr": (0.0, 0.1)}, "rises from above 0"),
    ],
)
def test_refused(arm: str, options: dict, text: str) -> None:
    with pytest.raises(UsageError, match=text):
        Contender.parse(arm, **options)
