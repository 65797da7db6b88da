"""Watch a training run without changing it."""

from trimtab.undisturbed import undisturbed
from trimtab.watch.probe import Attention, Probe, Reading, Scene
from trimtab.watch.watch import Watch

__all__ = ["Attention", "Probe", "Reading", "Scene", "Watch", "undisturbed"]
