"""Losses of models that generate: text without repetition, images, and samples that a critic judges."""
