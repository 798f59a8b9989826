"""examples/cuda_check on a card that is not there: its own main(), its launches executed by the emulator."""

from __future__ import annotations

import ctypes
import functools
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from . import cuda_emulation as emulation

ROOT = Path(__file__).parents[2]
ALLOCATE = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_size_t)
FREE = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
LAUNCH = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_char_p,
    ctypes.POINTER(ctypes.c_uint),
    ctypes.c_uint,
    ctypes.c_uint,
    ctypes.c_void_p,
    ctypes.c_size_t,
)


@functools.cache
def library() -> ctypes.CDLL:
    """cuda_check and the plan, compiled as a library without CUDA's runtime."""
    from ptxsim.toolchain import tool

    sources = [
        ROOT / "examples" / "cuda_check.cpp",
        Path(__file__).with_suffix(".cpp"),
        *(ROOT / "csrc" / "cuda").glob("*.cpp"),
        *(ROOT / "csrc" / "cuda" / "plan").glob("*.cpp"),
    ]
    options = ["-std=c++20", "-O2", "-shared", "-Xcompiler", "-fPIC", "-cudart", "none"]
    folders = [f"-I{folder}" for folder in (ROOT / "csrc", ROOT / "examples")]
    with tempfile.TemporaryDirectory() as tmp:
        out = f"{tmp}/cuda_check.so"
        subprocess.run([tool("nvcc"), *options, *folders, *map(str, sources), "-o", out], check=True)
        return ctypes.CDLL(out)


class PretendedCard:
    """Its memory is numpy's, which the emulator guards: nobody reads or writes beyond."""

    def __init__(self, processors: int = 2, shared_limit: int = 163 * 1024, architecture: str = "sm_80") -> None:
        self.card, self.architecture = (processors, shared_limit), architecture
        self.memory: dict[int, np.ndarray] = {}
        self.launched: list[tuple[str, tuple[int, ...], int, int]] = []
        self.faults: list[Exception] = []

    def allocate(self, size: int) -> int:
        whole = np.full(size + 256, 255, np.uint8)
        start = -whole.ctypes.data % 256
        data = whole[start : start + size]
        self.memory[data.ctypes.data] = data
        return data.ctypes.data

    def free(self, address: int) -> None:
        del self.memory[address]

    def launch(self, name: bytes, grid: Any, threads: int, shared: int, params: int, size: int) -> int:
        kernel, sizes = name.decode(), tuple(grid[i] for i in range(3))
        self.launched.append((kernel, sizes, threads, shared))
        try:
            emulation.kernels(self.architecture)[kernel].launch(
                sizes, threads, [ctypes.string_at(params, size)], shared=shared, buffers=[*self.memory.values()]
            )
        except Exception as fault:
            self.faults.append(fault)
            return 1
        return 0

    def run(self, *arguments: str) -> int:
        """The exit code of cuda_check with these arguments."""
        names = [name.encode() for name in emulation.kernels(self.architecture)]
        callbacks = ALLOCATE(self.allocate), FREE(self.free), LAUNCH(self.launch)
        library().pretend(*callbacks, *self.card, (ctypes.c_char_p * len(names))(*names), len(names))
        words = [b"cuda_check", *(word.encode() for word in arguments)]
        code = library().main(len(words), (ctypes.c_char_p * len(words))(*words))
        library().fflush(None)
        return code
