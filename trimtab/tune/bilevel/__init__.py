"""Hyper-parameters that follow a gradient, while the weights are trained."""
