"""The study of adapters: a function of the seed, options that act, metrics that are finite."""

from __future__ import annotations

import math

from trimtab.studies.adapters import transfer


def _run(seed, **options):
    return transfer(seed, width=16, depth=2, pretraining=3, steps=3, **options)


def test_transfer():
    connected, scattered = _run(0, connected=True, rank=4), _run(0, connected=False, rank=4)
    assert connected == _run(0, connected=True, rank=4)
    assert connected != _run(1, connected=True, rank=4)
    assert connected["sharpness"] != scattered["sharpness"]
    assert (scattered["trained"], connected["trained"]) == (2 * 2 * 16 * 4, 2 * 2 * 16 * 4 + 16)
    assert all(math.isfinite(value) for value in [*connected.values(), *scattered.values()])
    assert connected["sharpness"] > 0
