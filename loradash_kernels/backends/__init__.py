"""Sets of kernels for the same calls."""
