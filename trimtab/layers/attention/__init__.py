"""Attention: norms, gates and windows of its heads, doubly stochastic weights, graphs."""
