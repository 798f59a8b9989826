"""The cache of packed frozen weights.

Where the CPU kernels compute the base product themselves, they read W in panels. A frozen weight is packed once for
each pass and the copies are kept while its memory lives: as many bytes as W for the forward pass, and again for the
backward pass, and 0.2% for fingerprints.

A copy never outlives what it is a copy of: every call that uses one reads all of W first and compares its fingerprint
with that of the copy. A write is therefore seen by the very next call, forward or backward, whatever wrote it: in-place
operators, `.data`, NumPy, DLPack, another view. Two different weights have the same fingerprint with a probability of
at most 2^-64 over keys that are drawn anew in every process (NH; Black et al., "UMAC", CRYPTO 1999). What remains the
caller's to prevent is a write by another thread while a call runs.

Only memory that is seen a second time in the same pass is packed to be kept: casts by autocast and dequantised
weights, which are made for one call, are not. Calls on few rows let the library read W itself.
"""

from __future__ import annotations

from torch import Tensor

from .backends import extension


def enable_packed_weights(on: bool = True) -> None:
    """Keep packed copies of frozen weights (the default), or drop them all and pack in every call from now on."""
    if extension.is_compiled():
        extension.compiled().enable_packed_weights(on)


def invalidate_packed_weights(weight: Tensor | None = None) -> None:
    """Drop the packed copies of one weight's memory, or all of them, to give their bytes back.

    Results do not depend on it: a copy of what was overwritten is never used. The next call counts as the first.

    Args:
        weight: any tensor that views the memory, whatever its shape or dtype.

    Raises TypeError for anything but a tensor or None.
    """
    if weight is not None and not isinstance(weight, Tensor):
        raise TypeError(f"weight must be a tensor or None, got {type(weight).__name__}")
    if extension.is_compiled():
        extension.compiled().invalidate_packed_weights(weight)


def packed_weight_bytes() -> int:
    """Bytes that packed copies take now."""
    return extension.compiled().packed_weight_bytes() if extension.is_compiled() else 0
