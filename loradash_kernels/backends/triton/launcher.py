"""Launching a compiled kernel again without asking Triton which one it is. All contact with Triton's internals is here.

`JITFunction.run` binds the arguments of every launch to their names, specialises each of them, looks for the kernel that was
compiled for these and only then calls its launcher: about 20 us. A plan that is used again knows the outcome, so the last
call is repeated alone. Where Triton does not look as expected (`obstacle`) or somebody watches launches (`watched`),
launches go through Triton as ever.
"""

from __future__ import annotations

import functools
import inspect
import os
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch

# The call of JITFunction.run that is repeated, in Triton 3.3 to 3.9.
_LAUNCH = re.compile(
    r"kernel\.run\(grid_0, grid_1, grid_2, stream, kernel\.function, kernel\.packed_metadata, launch_metadata, "
    r"[\w.]+\.launch_enter_hook, [\w.]+\.launch_exit_hook, \*bound_args\.values\(\)\)"
)

STREAM, ARGUMENTS = 3, 9
"""Where the stream and where the kernel's own arguments begin in the arguments of a launcher."""


def obstacle(kernels: Sequence[Any]) -> str | None:
    """Why launches of these kernels are not repeated past Triton, or None."""
    from triton.runtime.jit import JITFunction

    strange = [kernel for kernel in kernels if not isinstance(kernel, JITFunction)]
    return f"{type(strange[0]).__name__} launches kernels, not Triton's JIT" if strange else _obstacle()


@functools.cache
def _obstacle() -> str | None:
    from triton.runtime.jit import JITFunction

    if torch.version.hip:
        return "on AMD Triton also specialises by the size of the memory behind a tensor"
    try:
        source = " ".join(inspect.getsource(JITFunction.run).split())
    except (OSError, TypeError) as error:
        return f"the source of Triton's JITFunction.run cannot be read: {error}"
    if not _LAUNCH.search(source):
        return "this Triton launches kernels in another way than Triton 3.3 to 3.9"
    return None


@functools.cache
def _settings() -> list[tuple[Any, str]]:
    """Whose attributes are set for all launches: debugging, instrumentation, hooks."""
    try:
        from triton import knobs
    except ImportError:
        # Triton 3.3 has no knobs yet; it reads the environment for debugging.
        from triton.compiler import CompiledKernel

        return [(CompiledKernel, "launch_enter_hook"), (CompiledKernel, "launch_exit_hook"), (_Environment(), "debug")]
    runtime, compilation = knobs.runtime, knobs.compilation
    wanted = [(runtime, "debug"), (runtime, "launch_enter_hook"), (runtime, "launch_exit_hook")]
    wanted += [(runtime, "add_stages_inspection_hook"), (compilation, "instrumentation_mode")]
    return [(owner, name) for owner, name in wanted if hasattr(owner, name)]


class _Environment:
    @property
    def debug(self) -> bool:
        return os.environ.get("TRITON_DEBUG", "0") == "1"


def watched(hooks: Sequence[list[Any]]) -> bool:
    """Does anything want to see every launch, or other code than what was compiled without it?

    hooks: `pre_run_hooks` of the kernels, the lists that Triton itself appends to.
    """
    for owner, name in _settings():
        value = getattr(owner, name)
        # A chain of hooks is always there, and true even where it is empty.
        if value and getattr(value, "calls", True):
            return True
    return any(hooks)


def repeated(compiled: Any, grid: tuple[int, ...], args: list[Any]) -> tuple[Callable[..., Any], list[Any]]:
    """The launcher of a compiled kernel and what it takes, the stream excepted, which goes to place STREAM.

    args: every argument of the kernel in its order, those that are compiled in among them; a pointer may be a number.
    """
    x, y, z = (*grid, 1, 1)[:3]
    return compiled.run, [x, y, z, None, compiled.function, compiled.packed_metadata, None, None, None, *args]


def current_stream(device: int) -> int:
    """The handle of the current stream of a device."""
    return _driver().active.get_current_stream(device)


@functools.cache
def _driver() -> Any:
    from triton.runtime import driver

    return driver
