"""S and S+ against numpy, by the paper's formula written down once more."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimtab.compare import log_grid, sensitivity
from trimtab.errors import UsageError

_LOSSES = st.lists(st.one_of(st.floats(0, 20), st.sampled_from([math.nan, math.inf, 1e30])), min_size=1, max_size=9)


@given(_LOSSES, st.floats(0.5, 10), st.randoms())
def test_equals_numpy(losses: list[float], initial: float, random: object) -> None:
    lrs = np.geomspace(1e-4, 1.0, len(losses))
    capped = np.minimum(np.nan_to_num(np.array(losses), nan=np.inf), initial)
    order = list(range(len(losses)))
    random.shuffle(order)  # type: ignore[attr-defined]
    found = sensitivity([lrs[place] for place in order], [losses[place] for place in order], initial)
    best = int(np.argmin(capped))
    assert found.best_lr == lrs[best]
    assert found.best_loss == capped[best]
    assert found.s == pytest.approx(np.mean(capped - capped.min()))
    assert found.s_plus == pytest.approx(np.mean((capped - capped.min())[best:]))


def test_by_hand() -> None:
    # min(l, 5) - 1 = 4, 1, 0, 1, 4
    found = sensitivity([1e-3, 1e-2, 1e-1, 1, 10], [9.0, 2.0, 1.0, 2.0, math.inf], 5.0)
    assert (found.s, found.s_plus) == (2.0, pytest.approx(5 / 3))


def test_a_curve_that_diverges_everywhere_has_no_sensitivity() -> None:
    found = sensitivity([0.1, 1.0], [math.nan, math.inf], 2.0)
    assert (found.s, found.s_plus, found.best_loss) == (0.0, 0.0, 2.0)


@pytest.mark.parametrize(
    ("lrs", "losses", "initial", "match"),
    [
        ([], [], 1.0, "one loss for each"),
        ([0.1], [1.0, 2.0], 1.0, "got 1 and 2"),
        ([0.1, 0.1], [1.0, 2.0], 1.0, "each learning rate once"),
        ([0.1], [1.0], math.nan, "must be finite"),
    ],
)
def test_wrong_curves_are_refused(lrs: list[float], losses: list[float], initial: float, match: str) -> None:
    with pytest.raises(UsageError, match=match):
        sensitivity(lrs, losses, initial)


def test_grid_equals_numpy_geomspace() -> None:
    assert log_grid("3e-4:3e-1", 7) == pytest.approx(np.geomspace(3e-4, 3e-1, 7), rel=5e-3)
    # Half a decade apart, as in the paper: {3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1} but for their rounding.
    assert log_grid("3e-4:3e-1", 7) == pytest.approx([3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1], rel=0.06)
    assert log_grid("1e-300:1e300", 3) == pytest.approx([1e-300, 1.0, 1e300])


@pytest.mark.parametrize(
    "bounds", ["", "1", "1:2:3", "a:b", "1:1", "2:1", "0:1", "-1:1", "nan:1", "1:nan", "1:inf", "1e-3", ":", "1e999:2"]
)
def test_wrong_ranges_are_refused(bounds: str) -> None:
    with pytest.raises(UsageError, match="range of learning rates"):
        log_grid(bounds, 3)


@pytest.mark.parametrize("points", [-1, 0, 1, 101])
def test_wrong_numbers_of_points_are_refused(points: int) -> None:
    with pytest.raises(UsageError, match="2 to 100 points"):
        log_grid("1e-3:1e-1", points)


def test_points_that_fall_together_are_refused() -> None:
    with pytest.raises(UsageError, match="do not fit"):
        log_grid("1:1.001", 50)
