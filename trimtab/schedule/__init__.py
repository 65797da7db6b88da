"""Learning-rate schedules and settings of a run, one method a module."""

from __future__ import annotations

from trimtab.catalogue import public_names

__getattr__, __dir__ = public_names(__name__)
