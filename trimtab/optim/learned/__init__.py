"""Learned optimizers and extrapolators, one a module."""
