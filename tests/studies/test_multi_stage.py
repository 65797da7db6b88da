"""The study of staged fits: a function of the seed, options that act, metrics that are finite."""

from __future__ import annotations

import math

import pytest

from trimtab.studies.multi_stage import curve


def test_curve():
    alone, staged = (curve(0, stages=stages, width=6, adam_steps=30, lbfgs_steps=90) for stages in (1, 3))
    assert staged == curve(0, stages=3, width=6, adam_steps=30, lbfgs_steps=90)
    assert staged != curve(1, stages=3, width=6, adam_steps=30, lbfgs_steps=90)
    assert all(math.isfinite(value) for value in [*alone.values(), *staged.values()])
    assert alone["parameters"] == pytest.approx(staged["parameters"], rel=0.1)
    assert (alone["last_kappa"], staged["last_kappa"] > 1) == (1, True)
