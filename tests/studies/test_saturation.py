"""The study of saturated outputs: a function of the seed, options that act, metrics that are finite."""

from __future__ import annotations

import math

from trimtab.studies.saturation import coordinate_fit


def test_coordinate_fit():
    plain, scaled = (coordinate_fit(0, alpha=alpha, width=16, steps=20) for alpha in (1.0, 0.1))
    assert plain == coordinate_fit(0, alpha=1.0, width=16, steps=20)
    assert plain != coordinate_fit(1, alpha=1.0, width=16, steps=20)
    assert all(math.isfinite(value) for value in [*plain.values(), *scaled.values()])
    assert plain["saturated"] > 0.4
    assert scaled["saturated"] == 0
    assert coordinate_fit(0, spread=0.5, width=16, steps=2)["saturated"] == 0
