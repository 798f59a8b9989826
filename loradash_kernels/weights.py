"""The cache of packed frozen weights.

Where the CPU kernels compute the base product themselves, they read W in panels. A frozen weight is packed once per
direction and the copies are kept while the weight lives: as many bytes as W for the forward pass, and again for the
backward pass. Writing to the weight, in place or through `.data`, replaces them.
"""

from __future__ import annotations

from . import _extension


def enable_packed_weights(on: bool = True) -> None:
    """Keep packed copies of frozen weights (the default), or drop them all and pack in every call from now on."""
    if _extension.is_compiled():
        _extension.compiled().enable_packed_weights(on)


def packed_weight_bytes() -> int:
    """Bytes that packed copies take now."""
    return _extension.compiled().packed_weight_bytes() if _extension.is_compiled() else 0
