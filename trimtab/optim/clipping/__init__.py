"""Transforms that bound or turn the gradient before it is used, one a module."""
