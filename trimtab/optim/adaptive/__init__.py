"""Optimizers with a step size of their own for every entry, row or tensor, one a module."""
