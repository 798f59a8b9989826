"""Decompositions of frozen weights, kept on disk: a base model is decomposed once, every task after that launches from it."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from loradash_kernels import Directions
from loradash_kernels.spectrum import Spectrum, choose_directions, decompose

from .checkpoint import replace_file
from .inject import dash_layers

FORMAT = "loradash-spectrum-1"
GB = 2**30


class SpectralCache:
    """Spectra on disk, one safetensors file a weight, named by a hash of the weight's values.

    A graded square weight takes (n / 12)(2 n + 1) float32 numbers, a sixth of its own in float32, and from n = 1536 on
    128 (2 n + 1); any other the square of its short side in float16, and in rare cases (ill-conditioned, rectangular) all
    triplets in float32.

    Files are written whole or not at all, by any number of processes; a damaged one is noticed by its checksum, warned
    of and made anew. When the folder exceeds `max_bytes`, those used longest ago are deleted.

    Args:
        folder: default $LORADASH_CACHE/spectra, or ~/.cache/loradash/spectra.
        max_bytes: of all files together; 0 for no limit.
    """

    def __init__(self, folder: str | os.PathLike | None = None, max_bytes: int = 32 * GB) -> None:
        root = Path(os.environ.get("LORADASH_CACHE", Path.home() / ".cache" / "loradash"))
        self.folder = Path(folder) if folder is not None else root / "spectra"
        self.max_bytes = max_bytes

    def size(self) -> int:
        """Bytes on disk."""
        return sum(file.stat().st_size for file in self._files())

    def has(self, weight: Tensor) -> bool:
        """Is there a file for this weight (N, K)? It is not read."""
        return self._path(weight).is_file()

    def spectrum(self, weight: Tensor, method: str = "auto") -> Spectrum:
        """That of a weight (N, K): from disk, or decomposed now and kept. method "exact" wants all triplets."""
        path = self._path(weight)
        found = self._read(path)
        if found is None or (method == "exact" and found.route == "tail"):
            found = decompose(weight, method)[0]
            self._write(path, found)
        return found

    def directions(
        self, weight: Tensor, lora_a: Tensor, lora_b: Tensor, s: int, scaling: float, method: str = "auto"
    ) -> Directions:
        """The task-specific directions of one layer, as `task_specific_directions`, from the kept spectrum.

        A tail that proves too short for this update is replaced by the full spectrum, for good.
        """
        spectrum = self.spectrum(weight, method)
        found = None
        if spectrum.sigma.shape[0] >= s:
            found = choose_directions(spectrum, weight, lora_a, lora_b, s, scaling=scaling)
        if found is None:
            found = choose_directions(self.spectrum(weight, "exact"), weight, lora_a, lora_b, s, scaling=scaling)
        if found is None:
            raise ValueError(f"no {s} directions of weight {tuple(weight.shape)} pass the residual check")
        return found

    def start(self, model: nn.Module) -> BackgroundDecomposition:
        """Decomposes the adapted layers' weights in a process of its own, at the lowest priority, while training runs."""
        return BackgroundDecomposition(self, [layer.weight_nk for layer in dash_layers(model).values()])

    # --- files -------------------------------------------------------------------------------------------------------

    def _path(self, weight: Tensor) -> Path:
        return self.folder / f"{weight_hash(weight)}.safetensors"

    def _files(self) -> Iterator[Path]:
        return self.folder.glob("*.safetensors")

    def _read(self, path: Path) -> Spectrum | None:
        try:
            with safe_open(str(path), framework="pt") as opened:
                header = opened.metadata() or {}
                if header.get("format") != FORMAT:
                    raise ValueError(f"format {header.get('format')!r}, wanted {FORMAT!r}")
                tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
            if header["checksum"] != _checksum(tensors):
                raise ValueError("the checksum differs")
            spectrum = Spectrum(header["route"], tensors["sigma"], tensors.get("u"), tensors.get("vt"))
        except FileNotFoundError:
            return None
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            warnings.warn(f"loradash: {path} is damaged ({error}); the weight is decomposed again", stacklevel=3)
            return None
        os.utime(path)  # used now
        return spectrum

    def _write(self, path: Path, spectrum: Spectrum) -> None:
        tensors = {name: t.cpu().contiguous() for name, t in spectrum.tensors().items()}
        header = {"format": FORMAT, "route": spectrum.route, "checksum": _checksum(tensors)}
        data = save(tensors, metadata=header)
        replace_file(path, lambda temporary: _write_bytes(temporary, data))
        self._trim(path)

    def _trim(self, kept: Path) -> None:
        """Deletes what was used longest ago until the folder fits; never the file just written."""
        if not self.max_bytes:
            return
        files = []
        for file in self._files():
            try:
                about = file.stat()
            except FileNotFoundError:  # another process deleted it
                continue
            files.append((about.st_mtime, about.st_size, file))
        excess = sum(size for _, size, _ in files) - self.max_bytes
        for _, size, file in sorted(files, key=lambda entry: entry[0]):
            if excess <= 0:
                return
            if file != kept:
                file.unlink(missing_ok=True)
                excess -= size


def weight_hash(weight: Tensor) -> str:
    """Of shape, dtype and values of a weight (N, K); strides and device do not matter."""
    values = weight.detach().cpu().contiguous()
    digest = hashlib.blake2b(digest_size=20)
    digest.update(json.dumps([list(values.shape), str(values.dtype)]).encode())
    digest.update(values.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _write_bytes(path: str, data: bytes) -> None:
    Path(path).write_bytes(data)


def _checksum(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.blake2b(digest_size=20)
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


# --- in the background -----------------------------------------------------------------------------------------------


class BackgroundDecomposition:
    """Fills a cache while something else runs: a process at the lowest priority, on one thread, one weight at a time.

    `weights` give one (N, K) each when called. Those that the cache has are only hashed; the others go through shared memory, one copy at a time. `cancel` ends it;
    so does the end of this process.
    """

    def __init__(self, cache: SpectralCache, weights: Iterable[Callable[[], Tensor]]) -> None:
        self._cache = cache
        self._weights = list(weights)
        self._done = 0
        self._error: str | None = None
        self._cancelled = False
        self._process: Any = None
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
        self._cancelled = True
        if self._process is not None and self._process.is_alive():
            self._process.terminate()
        self._thread.join()

    def _feed(self) -> None:
        if hasattr(os, "setpriority"):  # on Linux a thread has a priority of its own
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
        pipe = None
        try:
            for weight_of in self._weights:
                if self._cancelled:
                    return
                weight = weight_of().detach()
                if not self._cache.has(weight):
                    pipe = pipe or self._spawn()
                    pipe.send(weight.cpu().clone().share_memory_())
                    self._error = pipe.recv()
                    if self._error:
                        return
                self._done += 1
        except (EOFError, BrokenPipeError, ConnectionResetError):
            pass  # cancelled, or killed: launch decomposes what is missing
        finally:
            if pipe is not None:
                pipe.close()  # the other end reads the end of the file, and ends
                self._process.join()

    def _spawn(self) -> Any:
        context = multiprocessing.get_context("spawn")
        pipe, child = context.Pipe()
        arguments = (child, str(self._cache.folder), self._cache.max_bytes)
        self._process = context.Process(target=_work, args=arguments, daemon=True, name="loradash-decompose")
        self._process.start()
        child.close()
        return pipe


def _work(pipe: Any, folder: str, max_bytes: int) -> None:
    if hasattr(os, "nice"):
        os.nice(19)
    torch.set_num_threads(1)
    cache = SpectralCache(folder, max_bytes)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the training process, whose end ends this one
    try:
        while True:
            weight = pipe.recv()
            try:
                cache.spectrum(weight)
                pipe.send(None)
            except Exception as error:  # whatever it is, the parent reports it
                pipe.send(f"{type(error).__name__}: {error}")
    except EOFError:
        pass
