"""Where norms stand in a residual block, and what sets their scale and shift."""
