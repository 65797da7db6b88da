"""Optimizers whose state lives in a part of each matrix, one a module."""
