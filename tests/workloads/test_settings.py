from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from trimtab.errors import UsageError
from trimtab.workloads import Settings, parse_arm

DEFAULTS = Settings(lr=0.01, steps=100)


def test_arm_reads_optimizer_values_and_remedies() -> None:
    arm = parse_arm("adamw, lr=3e-2 ,batch_size=16,schedule=constant,with=qk-norm,with=z-loss", DEFAULTS)
    assert arm.optimizer == "adamw"
    assert arm.lr == 0.03
    assert arm.batch_size == 16
    assert arm.schedule == "constant"
    assert arm.remedies == ("qk-norm", "z-loss")
    assert arm.steps == 100


def test_arm_without_an_optimizer_keeps_the_default() -> None:
    assert parse_arm("lr=0.5", DEFAULTS.replace(optimizer="sgd")).optimizer == "sgd"


def test_remedies_add_to_those_of_the_defaults() -> None:
    defaults = DEFAULTS.replace(remedies=("qk-norm",))
    assert parse_arm("with=z-loss", defaults).remedies == ("qk-norm", "z-loss")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "cannot read ''"),
        ("adamw,", "cannot read ''"),
        ("lr", "cannot read 'lr'"),
        ("lr=", "cannot read 'lr='"),
        ("=1", "cannot read '=1'"),
        ("lr=1,adamw", "cannot read 'adamw'"),
        ("lr=fast", "lr should be a valid number"),
        ("lr=0", "lr should be greater than 0, got '0'"),
        ("lr=nan", "lr"),
        ("lr=inf", "lr should be a finite number, got 'inf'"),
        ("lr=1,lr=2", "lr is given twice"),
        ("options=1", "unknown setting 'options'"),
        ("beta2=1", "beta2 should be less than 1"),
        ("steps=0", "steps should be greater than or equal to 1"),
        ("steps=1.5", "steps should be a valid integer"),
        ("seed=-1", "seed"),
        ("lrr=1", "Did you mean 'lr'?"),
        ("remedies=qk-norm", "unknown setting 'remedies'"),
        ("optimizer=adam", "unknown optimizer 'adam'. Did you mean"),
        ("nonsense", "unknown optimizer 'nonsense'"),
        ("schedule=step", "unknown schedule 'step'"),
        ("with=qk-nrm", "Did you mean 'qk-norm'?"),
        ("with=qk-norm,with=qk-norm", "qk-norm is given twice"),
        ("momentum=0.5", "momentum has no effect with adamw"),
        ("sgd,beta1=0.5", "beta1 has no effect with sgd"),
    ],
)
def test_bad_arm_is_one_line_that_names_the_value(text: str, says: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_arm(text, DEFAULTS)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


pieces = st.sampled_from(
    [
        "adamw",
        "sgd",
        "lr",
        "with",
        "steps",
        "seed",
        "beta1",
        "remedies",
        "=",
        ",",
        "qk-norm",
        "1e-3",
        "nan",
        "-1",
        "9" * 400,
    ]
)


@settings(max_examples=300)
@given(st.text() | st.lists(pieces | st.text(max_size=3), max_size=8).map("".join))
@example("lr=\ud800")
@example("seed=" + "1" * 5000)
def test_every_text_gives_settings_or_one_line(text: str) -> None:
    try:
        arm = parse_arm(text, DEFAULTS)
    except UsageError as error:
        assert "\n" not in str(error)
        assert str(error)
    else:
        assert arm.lr > 0


values = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.lists(st.integers(), max_size=2)
)


@settings(max_examples=200)
@given(st.dictionaries(st.sampled_from([*Settings.model_fields, "other"]), values, max_size=4))
def test_every_value_gives_settings_or_one_line(changes: dict[str, Any]) -> None:
    for make in (lambda: DEFAULTS.replace(**changes), lambda: Settings(**changes)):
        try:
            made = make()
        except UsageError as error:
            assert "\n" not in str(error)
        else:
            assert Settings(**made.model_dump(mode="json")) == made


def test_settings_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        DEFAULTS.lr = 1.0  # type: ignore[misc]


def test_learning_rate_rises_linearly_and_falls_as_half_a_cosine() -> None:
    schedule = Settings(lr=2.0, steps=100, warmup=0.1)
    for step in range(10):
        assert schedule.learning_rate(step) == pytest.approx(2.0 * (step + 1) / 10)
    for step in range(10, 100):
        assert schedule.learning_rate(step) == pytest.approx(1 + math.cos(math.pi * (step - 10) / 90))
    assert 0 < schedule.learning_rate(99) < 0.001


def test_constant_learning_rate() -> None:
    schedule = Settings(lr=2.0, steps=10, warmup=0.0, schedule="constant")
    assert [schedule.learning_rate(step) for step in range(10)] == [2.0] * 10


@given(st.integers(1, 50), st.floats(0, 0.99), st.sampled_from(["cosine", "constant"]))
def test_learning_rate_stays_between_zero_and_its_peak(steps: int, warmup: float, schedule: str) -> None:
    chosen = Settings(lr=0.5, steps=steps, warmup=warmup, schedule=schedule)
    assert all(0 <= chosen.learning_rate(step) <= 0.5 for step in range(steps))
