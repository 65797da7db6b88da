"""The study of norm placement: deterministic, what it measures, and what it shows at small size."""

from __future__ import annotations

import math

import numpy as np
import pytest

from trimtab.studies.norm_placement import depth_profile, diverged_rates

TINY = {"blocks": 2, "width": 8, "steps": 2, "batch": 2}


def test_the_same_seed_gives_the_same_numbers():
    first = depth_profile(0, **TINY)
    assert depth_profile(0, **TINY) == first
    assert depth_profile(1, **TINY) != first
    assert all(math.isfinite(value) for value in first.values())


@pytest.mark.parametrize("placement", ["pre", "post", "sandwich", "peri", "res-post"])
def test_every_placement_runs(placement):
    found = depth_profile(0, placement=placement, **TINY)
    assert found["loss"] > 0
    assert found["gradient_ratio"] >= 1
    assert found["massive"] > 1


def test_post_norm_has_variance_one_everywhere():
    found = depth_profile(0, placement="post", **{**TINY, "steps": 1, "lr": 0.0})
    assert found["last_variance"] == pytest.approx(1, rel=1e-3)
    assert found["exponent"] == pytest.approx(0, abs=1e-3)


def test_res_post_starts_as_the_identity():
    found = depth_profile(0, placement="res-post", **TINY)
    assert found["initial_exponent"] == pytest.approx(0, abs=1e-6)


def test_peri_grows_linearly_where_pre_does_not():
    """At initialisation each of a block's two branches adds a variance of 1 to Peri-LN's stream, which starts at 1."""
    shape = {"blocks": 12, "width": 64, "steps": 1, "batch": 2}
    peri = depth_profile(0, placement="peri", **shape)
    depth = np.arange(1, 13)
    linear = np.polyfit(np.log(depth), np.log(1 + 2 * depth), 1)[0]
    assert peri["initial_exponent"] == pytest.approx(linear, abs=0.06)
    assert peri["initial_last_variance"] == pytest.approx(1 + 2 * 12, rel=0.2)
    pre = depth_profile(0, placement="pre", **shape)
    assert pre["initial_exponent"] > 1 > peri["initial_exponent"]


def test_diverged_rates_count():
    found = diverged_rates(0, placement="pre", **TINY)
    assert 0 <= found["diverged"] <= 5
    assert found["diverged"] == int(found["diverged"])
    assert found == diverged_rates(0, placement="pre", **TINY)
    assert found != diverged_rates(0, placement="peri", **TINY)
