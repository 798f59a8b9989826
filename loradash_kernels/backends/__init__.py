"""Sets of kernels for the same calls: a module each, of the shape of `registry.Backend`."""
