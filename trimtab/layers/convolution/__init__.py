"""Methods for convolutions: their operators' singular values, and their batch normalisation."""
