"""Warnings that a process sees once."""

from __future__ import annotations

import warnings

_given: set[str] = set()


def warn_once(message: str) -> None:
    """A UserWarning at the first call with this message, nothing at later ones."""
    if message not in _given:
        _given.add(message)
        warnings.warn(f"loradash_kernels: {message}", stacklevel=3)
