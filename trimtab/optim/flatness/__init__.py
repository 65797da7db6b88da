"""Optimizers that look around before they step, one a module."""
