"""The study of a head's memory, and the count of live bytes that it rests on."""

from __future__ import annotations

import pytest
import torch

from trimtab.studies._memory import PeakMemory
from trimtab.studies.head import memory

SMALL = {"classes": 2000, "tokens": 5000, "width": 8}


def test_only_what_is_alive_at_once_counts():
    before = torch.ones(1000)
    with PeakMemory() as memory:
        x = before + 1
        y = x * 2
        del x
        y.add_(1)
        view = y.view(10, 100)
        z = view.sum(0)
        before.mul_(2)
    assert memory.peak == 2 * 4000
    assert z.numel() == 100


def test_what_autograd_keeps_is_alive():
    leaf = torch.ones(1000, requires_grad=True)
    with PeakMemory() as plain:
        (2 * leaf).sum()
    with PeakMemory() as kept:
        leaf.exp().exp().sum()
    assert plain.peak == 4004
    assert kept.peak == 8004


def test_ways_differ_in_memory_alone():
    dense, cut, again = (memory(1, way=way, **SMALL) for way in ("dense", "cut", "recompute"))
    for other in (cut, again):
        assert other["loss"] == pytest.approx(dense["loss"], rel=1e-5)
        assert other["gradient_norm"] == pytest.approx(dense["gradient_norm"], rel=1e-4)
        assert other["peak_mib"] < dense["peak_mib"] - 4 * 2000 * 5000 / 2**20
    assert dense["peak_mib"] >= 2 * 4 * 2000 * 5000 / 2**20
