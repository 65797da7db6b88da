"""The study of windows: deterministic, alike whatever the bias but for it, and its table interpolates."""

from __future__ import annotations

import math

import pytest
import torch

from trimtab.errors import UsageError
from trimtab.studies.window_transfer import _Table, window_transfer

pytest.importorskip("sklearn")

TINY = {"layers": 1, "width": 8, "steps": 3, "batch": 8}


def test_the_same_seed_gives_the_same_numbers():
    first = window_transfer(0, **TINY)
    assert window_transfer(0, **TINY) == first
    assert window_transfer(1, **TINY) != first
    assert all(math.isfinite(value) for value in first.values())


def test_biases_differ():
    losses = {kind: window_transfer(0, bias=kind, **TINY)["transfer_loss"] for kind in ("table", "linear", "log")}
    assert len(set(losses.values())) == 3
    with pytest.raises(UsageError, match="unknown position bias 'none'"):
        window_transfer(0, bias="none", **TINY)


def test_a_table_of_a_plane_stays_one_when_interpolated():
    """Bicubic interpolation keeps a linear function of the offset linear away from the borders."""
    table = _Table(4, 2)
    table.table.data.copy_(torch.arange(7.0).expand(2, 7, 7))
    before = table()
    assert before[0, 0, 3] == 0  # the key is three columns on: the smallest offset
    assert before[0, 3, 0] == 6
    table.set_window((8, 8))
    after = table()
    assert after.shape == (2, 64, 64)
    row = after[0, 32:40, 36]  # queries of one row, against its fifth position: offsets -4 to 3
    torch.testing.assert_close(row.diff(), torch.full((7,), 7 / 15), atol=0.07, rtol=0)
    torch.testing.assert_close(row[4], torch.tensor(3.0))  # the offset 0 stays in the middle
