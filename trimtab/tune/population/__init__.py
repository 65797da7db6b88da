"""Populations: runs that copy the best of each other."""
