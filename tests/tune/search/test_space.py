"""The grammar of a space, its rules, and what is drawn from it."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimtab.errors import UsageError
from trimtab.tune import Choice, Range, parse_space
from trimtab.tune.search.space import dimension_from_json, dimension_of, space_from


class Fixed:
    """Draws what it was told to, and remembers what it was asked."""

    def __init__(self, value: Any) -> None:
        self.value = value
        self.asked: tuple[Any, ...] = ()

    def suggest_float(self, name: str, low: float, high: float, *, step: float | None, log: bool) -> float:
        self.asked = (name, low, high, step, log)
        return self.value

    def suggest_int(self, name: str, low: int, high: int, *, step: int, log: bool) -> int:
        self.asked = (name, low, high, step, log)
        return self.value

    def suggest_categorical(self, name: str, choices: Any) -> Any:
        self.asked = (name, *choices)
        return self.value


def test_grammar() -> None:
    texts = [
        "lr=1e-4:1e-1:log",
        "weight_decay = 0 : 0.3",
        "batch_size=16:128:int:log",
        "clip=0:2:step=0.5",
        "optimizer=adamw, lion",
        "schedule.decay=0.1,0.3",
    ]
    assert parse_space(texts) == {
        "lr": Range(1e-4, 1e-1, log=True),
        "weight_decay": Range(0, 0.3),
        "batch_size": Range(16, 128, integer=True, log=True),
        "clip": Range(0, 2, step=0.5),
        "optimizer": Choice(("adamw", "lion")),
        "schedule.decay": Choice(("0.1", "0.3")),
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lr", "cannot read the space 'lr': write NAME=LOW:HIGH"),
        ("=1:2", "cannot read the space"),
        ("two words=1:2", "cannot read the space"),
        ("lr=", "cannot read the space"),
        ("lr=1:1", "lr=1:1 is no space: low of a range should be below high, got 1.0 and 1.0."),
        ("lr=2:1", "should be below high"),
        ("lr=0:1:log", "low of a logarithmic range should be above 0, got 0.0."),
        ("lr=-1:1:log", "should be above 0"),
        ("lr=a:b", "'a' is not a number"),
        ("lr=0:inf", "'inf' is not a finite number"),
        ("lr=nan:1", "'nan' is not a finite number"),
        ("lr=1:2:cubic", "unknown ending 'cubic'; valid: int, log, step=SIZE."),
        ("n=1.5:4:int", "low of a range of whole numbers should be one, got 1.5."),
        ("n=1:4:log:step=1", "takes no step"),
        ("n=1:4:step=0", "step of a range should be above 0, got 0."),
        ("n=1:4:step=9", "at most high - low"),
        ("o=adamw", "at least two different values, got adamw."),
        ("o=a,a", "at least two different values"),
        ("o=,", "got none"),
    ],
)
def test_wrong_space_is_one_line(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)) as caught:
        parse_space([text])
    assert "\n" not in str(caught.value)


def test_a_name_twice_is_refused() -> None:
    with pytest.raises(UsageError, match="lr is given twice"):
        parse_space(["lr=1:2", "lr=1:3"])


@pytest.mark.parametrize(
    "dimension", [Range(1, 2), Range(1e-5, 1, log=True), Range(1, 9, integer=True, step=2), Choice((1, "a", True, 0.5))]
)
def test_json_round_trip(dimension: Range | Choice) -> None:
    assert dimension_from_json(dimension.to_json()) == dimension


def test_text_of_a_dimension_reads_back() -> None:
    for text in ("0.0001:0.1:log", "16:128:log:int", "0:2:step=0.5", "a,b"):
        (dimension,) = parse_space([f"x={text}"]).values()
        assert parse_space([f"x={dimension}"])["x"] == dimension


@given(st.floats(1e-8, 1e8), st.floats(1.001, 1e6), st.floats(0, 1))
def test_rounding_stays_within_and_near(low: float, factor: float, part: float) -> None:
    high = low * factor
    value = low + part * (high - low)
    rounded = Range(low, high).rounded(value)
    assert low <= rounded <= high
    assert math.isclose(rounded, value, rel_tol=5.1e-4)
    assert Range(low, high).rounded(rounded) == rounded


def test_what_is_asked_of_a_trial() -> None:
    drawn = Fixed(0.0123456)
    assert Range(1e-4, 1e-1, log=True).suggest(drawn, "lr") == 0.01235
    assert drawn.asked == ("lr", 1e-4, 1e-1, None, True)
    drawn = Fixed(0.30000000000000004)
    assert Range(0, 1, step=0.1).suggest(drawn, "x") == 0.30000000000000004
    drawn = Fixed(7)
    assert Range(1, 9, integer=True, step=2).suggest(drawn, "n") == 7
    assert drawn.asked == ("n", 1, 9, 2, False)
    drawn = Fixed("b")
    assert Choice(("a", "b")).suggest(drawn, "kind") == "b"
    assert drawn.asked == ("kind", "a", "b")


@pytest.mark.parametrize(
    ("dimension", "middle"),
    [
        (Range(1e-4, 1e-2, log=True), 1e-3),
        (Range(0, 10), 5.0),
        (Range(1, 4, integer=True), 2),
        (Range(0, 10, step=4), 4),
        (Choice(("b", "a")), "b"),
    ],
)
def test_middle(dimension: Range | Choice, middle: Any) -> None:
    assert dimension.middle == middle
    assert type(dimension.middle) is type(middle) or not isinstance(middle, float)


def test_space_from_objects_and_texts() -> None:
    assert space_from({"a": "1:2", "b": Range(0, 1), "c": Choice((1, 2))}) == {
        "a": Range(1, 2),
        "b": Range(0, 1),
        "c": Choice((1, 2)),
    }
    assert space_from(["a=1:2"]) == {"a": Range(1, 2)}
    for wrong in ("a=1:2", {"a": 3}, {3: "1:2"}, {"a": "1"}):
        with pytest.raises(UsageError):
            space_from(wrong)  # type: ignore[arg-type]


def test_dimension_of_the_arguments_of_suggest() -> None:
    assert dimension_of("x", 1, 2, log=True) == Range(1, 2, log=True)
    assert dimension_of("x", ["a", "b"]) == Choice(("a", "b"))
    for low, high in (
        (1, None),
        ("a", None),
        (["a", "b"], 2),
        (2, 1),
        (True, None),
        ([], None),
        (["a", object()], None),
    ):
        with pytest.raises(UsageError, match="cannot suggest x: "):
            dimension_of("x", low, high)  # type: ignore[arg-type]


def test_a_range_is_tried_out_between_its_ends_too() -> None:
    assert Range(8, 16).ends == (8, 8.01, 16)
    assert Range(0, 1, step=0.25).ends == (0, 0.25, 1)
    assert Range(8, 16, integer=True).ends == (8, 16)
    for low, high in ((1, 2000), (0, 10_000), (100, 100_000), (1e-9, 1.0)):
        low, inner, high = Range(low, high).ends
        assert low < inner < high
        assert inner != int(inner), "whole ends alone say nothing on what lies between"
