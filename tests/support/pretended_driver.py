"""A driver for Triton that compiles for a card and launches nothing, so that everything before a launch runs without a GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

from loradash_kernels.backends.triton import backend


class NothingLaunched:
    """Stands for Triton's launcher: takes the arguments of every launch."""

    # Where somebody wants to see them.
    seen: list[tuple[Any, ...]] | None = None

    def __init__(self, src: Any, metadata: Any) -> None:
        self.kernel = src.fn.__name__

    def __call__(self, *args: Any) -> None:
        if self.seen is not None:
            self.seen.append((self.kernel, *args))


class NoDriver:
    """As much of a Triton driver as compiling for `architecture` and launching ask for."""

    def __init__(self, architecture: int) -> None:
        import triton
        from triton.backends.compiler import GPUTarget

        # Module, function, registers, spills, and from Triton 3.4 on the most threads.
        loaded = (None, 1, 0, 0, 1024)[: 4 if triton.__version__.startswith("3.3.") else 5]
        self.launcher_cls = NothingLaunched
        self.utils = SimpleNamespace(
            load_binary=lambda name, binary, shared, device: loaded,
            get_device_properties=lambda device: {"max_shared_mem": 227 * 1024},
            unload_module=lambda module: None,
        )
        target = GPUTarget("cuda", architecture, 32)
        self.get_current_target = lambda: target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


# Functions: a mock takes longer to call than what is timed here.
def nothing(*arguments: Any) -> None:
    pass


def yes() -> bool:
    return True


@contextlib.contextmanager
def pretended_card(architecture: int = 80) -> Iterator[None]:
    """Triton compiles for a card, launches nothing, and the backend takes tensors on the CPU for that card's.

    For a process of its own: Triton keeps the driver and what was compiled for it.
    """
    from triton.runtime import driver

    driver.set_active(NoDriver(architecture))
    pretended = {"missing": nothing, "interpreted": yes, "architecture_of": lambda device: f"sm_{architecture}"}
    with mock.patch.multiple(backend, **pretended):
        yield
