"""Losses that make a classifier robust to perturbed inputs."""
