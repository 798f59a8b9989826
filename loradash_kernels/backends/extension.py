"""Loads the compiled part `_C` once and keeps the reason where there is none."""

from __future__ import annotations

import importlib
import warnings
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import ModuleType

BUILD = "`pip install --no-build-isolation .` where a C++ compiler and PyTorch are installed"


def _other_builds() -> list[str]:
    """Compiled parts of this package that this Python does not even look for."""
    own = {f"_C{suffix}" for suffix in EXTENSION_SUFFIXES}
    found = (f.name for pattern in ("_C.*so", "_C.*pyd") for f in Path(__file__).parents[1].glob(pattern))
    return sorted(name for name in found if name not in own)


def _load() -> tuple[ModuleType | None, str | None]:
    try:
        return importlib.import_module("loradash_kernels._C"), None
    except ModuleNotFoundError as error:
        others = _other_builds()
        if not others:
            return None, f"the compiled part is missing ({error}); build it with {BUILD}"
        broken = f"{', '.join(others)} was compiled for another Python"
    except ImportError as error:
        # A symbol is undefined after an upgrade of PyTorch, or a library is gone.
        broken = str(error)
    reason = f"the compiled part is there but does not load ({broken}); rebuild it with {BUILD}"
    warnings.warn(f"loradash_kernels: {reason}. Until then other backends run, slower", RuntimeWarning, stacklevel=2)
    return None, reason


_module, missing_reason = _load()


def compiled() -> ModuleType:
    """The compiled module. Raises RuntimeError, with the reason, where it is missing."""
    if _module is None:
        raise RuntimeError(f"loradash_kernels: {missing_reason}")
    return _module


def is_compiled() -> bool:
    return _module is not None
