"""The public conformance kit: subclass a test case, give it one fixture, inherit the whole contract.

    class TestMyLoss(trimtab.testing.LossTestCase):
        loss = staticmethod(my_loss)

The test cases need pytest (`pip install 'trimtab[testing]'`); nothing else in trimtab does.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trimtab.testing.layers import LayerTestCase
    from trimtab.testing.losses import LossTestCase
    from trimtab.testing.optimizers import OptimizerTestCase
    from trimtab.testing.preferences import PreferenceLossTestCase
    from trimtab.testing.probe import ProbeTestCase
    from trimtab.testing.ranks import run_ranks
    from trimtab.testing.schedules import ScheduleTestCase

__all__ = [
    "LayerTestCase",
    "LossTestCase",
    "OptimizerTestCase",
    "PreferenceLossTestCase",
    "ProbeTestCase",
    "ScheduleTestCase",
    "run_ranks",
]

_HOME = {
    "LayerTestCase": "trimtab.testing.layers",
    "LossTestCase": "trimtab.testing.losses",
    "OptimizerTestCase": "trimtab.testing.optimizers",
    "PreferenceLossTestCase": "trimtab.testing.preferences",
    "ProbeTestCase": "trimtab.testing.probe",
    "ScheduleTestCase": "trimtab.testing.schedules",
    "run_ranks": "trimtab.testing.ranks",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'trimtab.testing' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(_HOME)
