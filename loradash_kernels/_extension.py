"""Loads the compiled part `_C` once and keeps the reason where there is none."""

from __future__ import annotations

import importlib
from types import ModuleType


def _load() -> tuple[ModuleType | None, str | None]:
    try:
        return importlib.import_module("loradash_kernels._C"), None
    except ImportError as error:
        return None, (
            f"the compiled part is missing ({error}); build it with "
            "`pip install --no-build-isolation .` where a C++ compiler and PyTorch are installed"
        )


_module, missing_reason = _load()


def compiled() -> ModuleType:
    """The compiled module. Raises RuntimeError, with the reason, where it is missing."""
    if _module is None:
        raise RuntimeError(f"loradash_kernels: {missing_reason}")
    return _module


def is_compiled() -> bool:
    return _module is not None
