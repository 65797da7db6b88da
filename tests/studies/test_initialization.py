"""The studies of initialisations: a function of the seed, options that act, metrics that are finite."""

from __future__ import annotations

import math

import pytest

from trimtab.errors import UsageError
from trimtab.studies.initialization import deep_relu, graph_network


def test_deep_relu():
    he = deep_relu(0, init="he", depth=12, width=32, steps=5)
    glorot = deep_relu(0, init="glorot", depth=12, width=32, steps=5)
    assert he == deep_relu(0, init="he", depth=12, width=32, steps=5)
    assert he != deep_relu(1, init="he", depth=12, width=32, steps=5)
    assert all(math.isfinite(value) for value in [*he.values(), *glorot.values()])
    assert glorot["forward_ratio"] < 0.05 * he["forward_ratio"]
    assert he["vanishing"] == 0
    assert deep_relu(0, init="torch", depth=12, width=32, steps=1)["vanishing"] > 5
    with pytest.raises(UsageError, match="unknown initialisation 'zero'"):
        deep_relu(0, init="zero")


def test_graph_network():
    arms = {init: graph_network(0, init=init, nodes=120, width=16, labels=3, steps=5) for init in ("glorot", "virgo")}
    assert arms["virgo"] == graph_network(0, init="virgo", nodes=120, width=16, labels=3, steps=5)
    assert all(math.isfinite(value) for arm in arms.values() for value in arm.values())
    assert arms["virgo"]["drift"] < 0.6 * arms["glorot"]["drift"]
    with pytest.raises(UsageError, match="unknown initialisation 'lecun'"):
        graph_network(0, init="lecun")
