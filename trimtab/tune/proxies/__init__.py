"""Cheap stand-ins for training: scores of untrained networks, laws of losses over mixtures."""
