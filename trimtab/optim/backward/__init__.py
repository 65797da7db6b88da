"""Changes to gradients inside the backward pass, one a module."""
