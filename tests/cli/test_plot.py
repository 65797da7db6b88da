"""The terminal's plot: every point at its place."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from trimtab.cli.plot import curves

_LOSSES = st.lists(st.floats(0, 10), min_size=1, max_size=9)


@given(_LOSSES, st.integers(1, 20))
def test_one_mark_for_each_learning_rate_and_the_best_at_the_bottom(losses: list[float], height: int) -> None:
    lrs = [10.0**-place for place in range(len(losses))]
    lines = curves(lrs, {"only": losses}, height=height)
    body = [line.partition("|")[2] for line in lines[:height]]
    marks = {(row, column) for row, line in enumerate(body) for column, mark in enumerate(line) if mark == "o"}
    assert len(marks) == len(losses)
    assert len({column for _, column in marks}) == len(losses)
    by_place = [row for row, _ in sorted(marks, key=lambda mark: mark[1])]
    for first, loss in zip(by_place, losses, strict=True):
        for second, other in zip(by_place, losses, strict=True):
            assert loss <= other or first <= second  # a larger loss is never drawn lower
    assert lines[-1] == "o only"


def test_two_curves_on_one_point_are_marked_as_such() -> None:
    text = "\n".join(curves([0.1, 1.0], {"a": [1.0, 2.0], "b": [1.0, 3.0]}))
    assert text.count("&") == 2
    assert text.endswith("o a   + b   & several")
