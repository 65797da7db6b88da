"""Tune hyper-parameters: find a learning rate, search a space, carry over what a small model found."""

from __future__ import annotations

from trimtab.catalogue import public_names

__getattr__, __dir__ = public_names(__name__)
