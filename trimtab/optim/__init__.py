"""Optimizers and gradient transforms, one method a module."""

from __future__ import annotations

from trimtab.catalogue import public_names

__getattr__, __dir__ = public_names(__name__)
