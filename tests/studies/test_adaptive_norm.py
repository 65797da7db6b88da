"""The study of adaptive norms: deterministic, alike whatever the kind but for the modulation."""

from __future__ import annotations

import math

import pytest

from trimtab.studies.adaptive_norm import denoising

pytest.importorskip("sklearn")

TINY = {"layers": 2, "width": 8, "steps": 3, "batch": 4}


def test_the_same_seed_gives_the_same_numbers():
    first = denoising(0, **TINY)
    assert denoising(0, **TINY) == first
    assert denoising(1, **TINY) != first
    assert all(math.isfinite(value) for value in first.values())


def test_kinds_start_alike_and_then_differ():
    """All modulations start at 0: before the first update every kind is the same function."""
    start = {kind: denoising(0, kind=kind, **{**TINY, "steps": 1, "lr": 0.0}) for kind in ("full", "single", "sola")}
    assert start["full"]["loss"] == pytest.approx(start["single"]["loss"], rel=1e-6)
    assert start["full"]["loss"] == pytest.approx(start["sola"]["loss"], rel=1e-6)
    after = {kind: denoising(0, kind=kind, **TINY)["loss"] for kind in ("full", "single", "sola")}
    assert len(set(after.values())) == 3


def test_parameters():
    full, single, sola = (denoising(0, kind=kind, **TINY) for kind in ("full", "single", "sola"))
    rest = {found["parameters"] - found["modulation_parameters"] for found in (full, single, sola)}
    assert len(rest) == 1
    assert full["modulation_parameters"] == 2 * (6 * 8 * 8 + 6 * 8)
    assert single["modulation_parameters"] == 6 * 8 * 8 + 6 * 8 + 2 * 6 * 8
    assert sola["modulation_parameters"] == single["modulation_parameters"] + 2 * (8 * 12 + 12 * 48)
