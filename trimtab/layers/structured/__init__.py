"""Structured linear layers: matrices that are products of small factors, in place of dense ones."""
