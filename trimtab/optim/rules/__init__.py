"""Training rules that take the place of backpropagation, one a module."""
