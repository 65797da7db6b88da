"""Optimizers that treat a weight as a matrix: orthogonalised and Kronecker-preconditioned, one a module."""
