"""Solvers for whole problems, one a module."""
