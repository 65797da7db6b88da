"""The built-in probes, one family of signals each."""

from __future__ import annotations

from trimtab.watch.probe import Probe
from trimtab.watch.probes.activations import Activations
from trimtab.watch.probes.attention import AttentionStatistics
from trimtab.watch.probes.gradients import Gradients
from trimtab.watch.probes.logits import Logits
from trimtab.watch.probes.units import Units
from trimtab.watch.probes.updates import Updates

__all__ = [
    "Activations",
    "AttentionStatistics",
    "Gradients",
    "Logits",
    "Units",
    "Updates",
    "default_probes",
]


def default_probes() -> list[Probe]:
    """Return a fresh instance of every built-in probe: what a watch uses when it is not told otherwise."""
    return [Gradients(), Updates(), Activations(), Units(), AttentionStatistics(), Logits()]
