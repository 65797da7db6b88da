"""Schedules of the catalogue, and other sizes of the model, as settings of runs."""

from __future__ import annotations

import pytest
import torch

from trimtab.catalogue import methods
from trimtab.compare import Arm
from trimtab.errors import UsageError
from trimtab.record import Run
from trimtab.schedule import cosine, linear, wsd
from trimtab.workloads import Settings, parse_arm, train, workload
from trimtab.workloads.schedules import schedule_names
from trimtab.workloads.session import Session

DEFAULTS = Settings(lr=0.5, steps=100, warmup=0.1)


def rates(settings: Settings) -> list[float]:
    return [settings.learning_rate(step) for step in range(settings.steps + 20)]


@pytest.mark.parametrize(
    ("arm", "factor"),
    [
        ("schedule=linear", linear(100, warmup=10)),
        ("schedule=linear,warmup=0", linear(100)),
        ("schedule=wsd,schedule.decay=0.3,schedule.form=linear", wsd(100, warmup=10, decay=30, form="linear")),
        ("schedule=wsd,schedule.decay=25", wsd(100, warmup=10, decay=25)),
        ("schedule=wsd,schedule.warmup=3", wsd(100, warmup=3)),
        ("schedule=cosine,schedule.floor=0.1", cosine(100, warmup=10, floor=0.1)),
    ],
)
def test_a_run_gets_the_schedule_with_its_own_steps_and_warmup(arm, factor):
    settings = parse_arm(arm, DEFAULTS)
    assert rates(settings) == [0.5 * factor(step) for step in range(120)]
    assert rates(Settings(**settings.model_dump(mode="json"))) == rates(settings)


@pytest.mark.parametrize("name", schedule_names())
def test_every_schedule_sets_the_rate_of_each_step(name, tmp_path):
    job = workload("regression")
    settings = job.defaults.replace(schedule=name, steps=12)
    train(job, settings, out=tmp_path)
    with Run(tmp_path) as run:
        seen = run.series("lr").flat.tolist()
    assert seen == [settings.learning_rate(step) for step in range(12)]


def test_every_schedule_of_the_room_can_be_named():
    shapes = {card.name for card in methods(room="schedule") if card.acts_on == "settings" and card.apply is None}
    assert shapes - {"convex-bound"} <= set(schedule_names())


@pytest.mark.parametrize(
    ("arm", "text"),
    [
        ("schedule=step", "unknown schedule 'step'"),
        ("schedule=wsd,schedule.deca=3", "Did you mean 'schedule.decay'"),
        ("schedule=wsd,schedule.decay=5.5", "a number of steps, or a fraction below 1, got 5.5"),
        ("schedule=wsd,schedule.decay=x", "decay of schedule wsd should be"),
        ("schedule=wsd,schedule.decay=0.95", "more than the 100 steps in all"),
        ("schedule=constant,schedule.floor=0.1", "unknown setting 'schedule.floor'"),
        ("schedule=1cycle,warmup=0.2", "warmup has no effect with schedule=1cycle"),
        ("width=-1", "width should be greater than or equal to 0"),
        ("width=1.5", "width should be"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(arm, text):
    with pytest.raises(UsageError, match=text) as caught:
        parse_arm(arm, DEFAULTS)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("schedule", ["wsd", "cosine", "constant"])
def test_an_option_that_a_schedule_does_not_have_is_refused_in_one_line(schedule):
    with pytest.raises(UsageError, match="nope"):
        DEFAULTS.replace(schedule=schedule, **{"schedule.nope": "1"})


def test_another_schedule_starts_without_the_options_of_the_last():
    settings = parse_arm("schedule=wsd,schedule.decay=0.3", DEFAULTS)
    assert settings.replace(schedule="linear").schedule_options == ()
    assert settings.replace(lr=0.1).schedule_options == (("decay", 0.3),)
    assert settings.replace(**{"schedule.form": "linear"}).schedule_options == (("decay", 0.3), ("form", "linear"))


@pytest.mark.parametrize("name", ["lm-small", "digits-vit", "digits-mlp", "digits-cnn", "modadd", "tabular"])
def test_models_have_other_widths_and_are_the_same_at_their_own(name):
    job = workload(name)
    own = job.model(3)
    again = job.model(3, width=job.width, depth=job.depth or 0)
    assert all(torch.equal(one, two) for one, two in zip(own.parameters(), again.parameters(), strict=True))
    count, wide = (sum(p.numel() for p in model.parameters()) for model in (own, job.model(3, width=2 * job.width)))
    assert 1.8 * count < wide < 4.2 * count


def test_models_have_other_depths():
    assert len(workload("lm-small").model(0, depth=2).blocks) == 2
    assert len(workload("digits-vit").model(0, depth=5).blocks) == 5
    assert len(workload("digits-mlp").model(0, depth=3)) == 7


@pytest.mark.parametrize(
    ("name", "arm", "text"),
    [
        ("digits-cnn", "depth=2", "the model of digits-cnn has no depth to change"),
        ("lm-small", "width=30", "a multiple of its 4 heads, got 30"),
        ("modadd", "width=31", "must be even"),
    ],
)
def test_sizes_that_a_model_cannot_have_are_refused_before_training(name, arm, text):
    job = workload(name)
    with pytest.raises(UsageError, match=text):
        Arm.parse(arm, job.defaults).check(job)


def test_a_run_is_recorded_with_its_size_and_trains_it(tmp_path):
    settings = workload("digits-mlp").defaults.replace(steps=5, width=16, depth=1)
    outcome = train("digits-mlp", settings, out=tmp_path / "run")
    with Run(tmp_path / "run") as run:
        assert run.meta["config"]["width"] == 16
        assert sum(run.meta["parameters"].values()) == 64 * 16 + 16 + 16 * 10 + 10
    assert outcome.settings["depth"] == 1
    assert "width" not in workload("digits-mlp").defaults.model_dump()


def test_groups_keep_their_share_of_the_learning_rate(monkeypatch):
    def two_groups(model, settings):
        first, *rest = model.parameters()
        return torch.optim.SGD([{"params": [first], "lr": 0.25 * settings.lr}, {"params": rest}], lr=settings.lr)

    monkeypatch.setattr("trimtab.workloads.session.make_optimizer", two_groups)
    job = workload("regression")
    run = Session(job, job.defaults.replace(schedule="linear", steps=10, warmup=0.0), {})
    job.prepare()
    run.start(None, None)
    for step in range(3):
        run.step(None, None)
        run.at.step += 1
        rate = job.defaults.lr * (1 - step / 10)
        assert [group["lr"] for group in run.optimizer.param_groups] == pytest.approx([0.25 * rate, rate], rel=1e-12)
