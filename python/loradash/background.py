"""Decompositions beside training: a process of its own at the lowest priority, and the thread that feeds it.

The process is a new interpreter that imports this package and nothing of the program that started it: a script is not run
a second time, whether it has a main guard, comes from a notebook or from standard input.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable
from multiprocessing.spawn import get_executable
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import save
from torch import Tensor

from .streams import SideStreams, borrow

# Before every message to the process stands its length, a number of so many bytes.
LENGTH_BYTES = 8
THREADS = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")

# What the new interpreter runs. Ctrl-C is for the training process, whose end ends this one. What a library prints is no
# answer, so it goes where errors go. The modules are found where the parent finds them.
BOOTSTRAP = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)
if hasattr(os, "nice"):
    os.nice(19)
answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
os.dup2(2, 1)
sys.path[:] = sys.argv[3:]
try:
    from loradash.background_process import serve
except BaseException as error:
    import json
    print(json.dumps({"error": f"{type(error).__name__}: {error}"}), file=answers, flush=True)
    raise
serve(sys.argv[1], int(sys.argv[2]), answers)
"""


class Cache(Protocol):
    """What this file needs of `SpectralCache`."""

    folder: Path
    max_bytes: int

    def has(self, weight: Tensor) -> bool: ...


class BackgroundDecomposition:
    """Fills a cache while something else runs: a process at the lowest priority, on one thread, one weight at a time.

    Training never notices a failure: `wait` reports it, and launch decomposes what is missing. On GPUs the weights are read
    on streams of their own, which begin after what is enqueued when this is made. A CUDA graph captured meanwhile must not
    forbid other threads' calls (`capture_error_mode="thread_local"`); or `wait` first.

    Args:
        cache: to be filled.
        weights: give one (N, K) each when called, in a thread. Those that the cache has are only looked for; copies of the
            others go to the process through a pipe. `cancel` ends it; so does the end of this process.
        devices: where the weights are.
    """

    def __init__(
        self, cache: Cache, weights: Iterable[Callable[[], Tensor]], devices: Iterable[torch.device] = ()
    ) -> None:
        self._cache = cache
        self._streams = SideStreams(devices)
        self._weights = list(weights)
        self._done = 0
        self._error: str | None = None
        self._cancelled = False
        self._worker: _Worker | None = None
        self._starting = threading.Lock()
        self._thread = threading.Thread(target=self._feed, daemon=True, name="loradash-decompose")
        self._thread.start()

    @property
    def remaining(self) -> int:
        """Weights still to be decomposed, or looked for."""
        return len(self._weights) - self._done

    def wait(self, timeout: float | None = None) -> bool:
        """Waits for the end. True when all weights are in the cache; RuntimeError when one failed."""
        self._thread.join(timeout)
        if self._error:
            raise RuntimeError(f"background decomposition failed: {self._error}")
        return self.remaining == 0

    def cancel(self) -> None:
        """Stops at once; what is finished stays in the cache."""
        with self._starting:
            self._cancelled = True
            if self._worker is not None:
                self._worker.kill()
        self._thread.join()

    def _feed(self) -> None:
        _lower_priority()
        try:
            with self._streams.entered():
                self._feed_all()
        except Exception as error:
            # Whatever it is, `wait` reports it.
            if not self._cancelled:
                self._error = f"{type(error).__name__}: {error}"
        finally:
            if self._worker is not None:
                self._worker.close()

    def _feed_all(self) -> None:
        for weight_of in self._weights:
            if self._cancelled:
                return
            weight = borrow(weight_of())
            if not self._cache.has(weight) and not self._decompose(weight):
                return
            # A dequantised weight goes before the next one comes.
            del weight
            self._done += 1

    def _decompose(self, weight: Tensor) -> bool:
        with self._starting:
            if self._cancelled:
                return False
            self._worker = self._worker or _Worker(self._cache.folder, self._cache.max_bytes)
        self._error = self._worker.decompose(weight)
        return self._error is None


class _Worker:
    """The process as its parent sees it. Raises RuntimeError where none can be started or it ended, OSError of its pipes."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._process = subprocess.Popen(
            [_interpreter(), "-c", BOOTSTRAP, str(folder), str(max_bytes), *_module_path()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, **THREADS},
            # Windows has no `os.nice` with which the process could lower its own priority.
            creationflags=getattr(subprocess, "IDLE_PRIORITY_CLASS", 0) | getattr(subprocess, "CREATE_NO_WINDOW", 0),
        )
        self.pid = self._process.pid

    def decompose(self, weight: Tensor) -> str | None:
        """Puts a weight's decomposition into the cache. Returns what went wrong, if anything did."""
        assert self._process.stdin is not None and self._process.stdout is not None
        # From a GPU this waits for the current stream alone. Not through pinned memory, whose allocation may hold up others.
        data = save({"weight": weight.cpu().contiguous()})
        try:
            self._process.stdin.write(len(data).to_bytes(LENGTH_BYTES, "little"))
            self._process.stdin.write(data)
            self._process.stdin.flush()
        except BrokenPipeError:
            # The process has ended, and what it said before tells more.
            pass
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the process ended with code {self._process.wait()}")
        return json.loads(answer)["error"]

    def kill(self) -> None:
        self._process.kill()

    def close(self) -> None:
        """Ends the process, which has nothing left to do, and waits for its end."""
        self.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):
                pipe.close()  # type: ignore[union-attr]


def _interpreter() -> str:
    found = get_executable()
    found = os.fsdecode(found) if found else ""
    if not found or (getattr(sys, "frozen", False) and found == sys.executable):
        raise RuntimeError(
            "this program has no Python interpreter to start; name one by multiprocessing.set_executable(path)"
        )
    return found


def _module_path() -> list[str]:
    """Where this process finds modules, and its own packages: the import hooks of an editable install do not reach a child."""
    packages = [Path(sys.modules[name].__file__ or "").parents[1] for name in ("loradash", "loradash_kernels")]
    return [entry or os.getcwd() for entry in sys.path if isinstance(entry, str)] + [str(p) for p in packages]


def _lower_priority() -> None:
    """Lowers the priority of this thread; only on Linux do threads have one of their own."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
