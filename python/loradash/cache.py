"""Decompositions of frozen weights, kept on disk: a base model is decomposed once, and every later task launches from it."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from loradash_kernels import Directions, task_specific_directions
from loradash_kernels.directions.kept import KeptDecomposition, choose_directions, decompose_to_keep
from loradash_kernels.files import replace_bytes

from .background import BackgroundDecomposition
from .distributed import Group, cost, is_sharded, place, reshard, share_out
from .experts import matrices
from .fingerprint import FORMAT, fingerprint
from .state import dash_layers
from .units import Units

GB = 2**30
# A file that is still half written after so long belongs to a process that was killed.
STALE_SECONDS = 86400
NAME = re.compile(r"[0-9a-f]{40}\.safetensors(?P<partial>.*\.partial)?")


class _File(NamedTuple):
    path: Path
    used: float
    bytes: int
    partial: bool


class SpectralCache:
    """Decompositions on disk, one safetensors file a weight, named by a fingerprint of the weight's values.

    A graded square weight takes (n / 12)(2 n + 1) float32 numbers, a sixth of its own in float32, and from n = 1536 on
    128 (2 n + 1). Any other takes the square of its short side in float16, or all triplets in float32 where its condition
    number is above 50 or its rank deficient.

    A weight is found again by its values: on any device, in any layout, stored as (N, K) or transposed, and in float32
    where it was bfloat16 or float16 before, as long as no value was rounded. Its fingerprint is computed where it lies,
    anew in every call, so that no write to it goes unseen.

    A cache is a convenience: of a folder that cannot be made, read or written, a full disk or a damaged file it warns once,
    and computes the decomposition. Files are written whole or not at all, by any number of processes. When the folder
    exceeds `max_bytes`, those used longest ago are deleted, and so are halves of files that are a day old. Files of another
    version are never found again, and are deleted in their turn.

    Args:
        folder: default $LORADASH_CACHE/spectra, or ~/.cache/loradash/spectra.
        max_bytes: of all files together; 0 for no limit.
    """

    def __init__(self, folder: str | os.PathLike | None = None, max_bytes: int = 32 * GB) -> None:
        self.folder = Path(folder) if folder is not None else _default_folder()
        self.max_bytes = max_bytes
        self._said: set[str] = set()

    def size(self) -> int:
        """Bytes on disk, halves of files included."""
        return sum(file.bytes for file in self._files())

    def has(self, weight: Tensor) -> bool:
        """Is there a file for this weight (N, K)? It is not read."""
        return any(self._exists(self._path(name)) for name in fingerprint(weight))

    def spectrum(self, weight: Tensor, method: str = "auto") -> KeptDecomposition:
        """What is kept of a weight (N, K): read from disk, or decomposed now and written there.

        method "exact" wants all triplets, and replaces a tail that was kept.

        Raises ValueError as `change_rates` does, never for the state of the disk.
        """
        return self._spectrum(weight, method, self._write_or_warn)

    def keep(self, weight: Tensor, method: str = "auto") -> KeptDecomposition:
        """The same as `spectrum`, but raises OSError where the decomposition cannot be written."""
        return self._spectrum(weight, method, self._write)

    def directions(
        self, weight: Tensor, lora_a: Tensor, lora_b: Tensor, s: int, scaling: float, method: str = "auto"
    ) -> Directions:
        """The directions that `task_specific_directions` finds for one layer, chosen from what is kept of its weight.

        A tail that proves too short for this update is replaced by all triplets, for good. Raises ValueError as
        `task_specific_directions` does, never for the state of the disk.
        """
        kept = self.spectrum(weight, method)
        found = _choose(kept, weight, lora_a, lora_b, s, scaling)
        if found is None and kept.route == "tail":
            found = _choose(self.spectrum(weight, "exact"), weight, lora_a, lora_b, s, scaling)
        if found is None:
            found = task_specific_directions(weight, lora_a, lora_b, s, scaling=scaling, method=method)
            self._warn(
                "unfit", f"what is kept of a weight {tuple(weight.shape)} fails its check; it is decomposed again"
            )
        return found

    def start(self, model: nn.Module, group: Group = "world") -> BackgroundDecomposition:
        """Decomposes the adapted layers' weights in a process of its own, at the lowest priority, while training runs.

        Under torch.distributed each process of a group (`DashSchedule`'s) takes the share of the layers that launch will give
        it, where all have trained.
        Layers with sharded parameters are left out, with a warning, as only all processes together can gather them; so are
        offloaded ones, which training brings in and sends away meanwhile.
        """
        # What FSDP2 left gathered after a forward pass it will free.
        reshard(model)
        held, units = dash_layers(model), Units(model)
        merged = [name for name, layer in held.items() if layer.merged]
        if merged:
            raise ValueError(f"unmerge(model) before its weights are decomposed; merged: {', '.join(merged[:4])}")
        # Of a sharded experts' parameter this process has no experts to look at.
        unread = {
            n: layer
            for n, layer in held.items()
            if layer.weight.is_meta or any(map(is_sharded, (layer.weight, layer.lora_a))) or units.has(layer)
        }
        layers, left_out = matrices(held), list(matrices(unread))
        if left_out:
            warnings.warn(
                f"loradash: {len(left_out)} of {len(layers)} layers are sharded or offloaded and cannot be read in the "
                f"background; launch decomposes them: {', '.join(left_out[:4])}",
                stacklevel=2,
            )
        rank, processes = place(group)
        costs = {n: cost(m.out_features, m.in_features) for n, m in layers.items() if m.dash_vt.shape[0]}
        read = [layers[name] for name in share_out(costs, processes)[rank] if name not in left_out]
        devices = [p.device for layer in read for p in (layer.weight, layer.lora_a)]
        return BackgroundDecomposition(self, [layer.weight_nk for layer in read], devices)

    def _spectrum(
        self, weight: Tensor, method: str, write: Callable[[Path, KeptDecomposition], None]
    ) -> KeptDecomposition:
        names = fingerprint(weight)
        # transformers' Conv1D stores (K, N), of which the weight is a view: the file of either layout serves the other.
        for name, turned in ((names.itself, False), (names.transposed, True)):
            found = self._read(self._path(name), weight.mT if turned else weight)
            if found is not None and not (method == "exact" and found.route == "tail"):
                return found.transposed() if turned else found
        (made,) = decompose_to_keep(weight, method)
        write(self._path(names.itself), made)
        return made

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    def _exists(self, path: Path) -> bool:
        try:
            return path.is_file()
        except (OSError, ValueError):
            # The folder may not be entered, or its name cannot be one.
            return False

    def _files(self) -> list[_File]:
        """The kept decompositions, and the halves of files that somebody writes. Nothing else in the folder is ours."""
        found = []
        with contextlib.suppress(OSError, ValueError), os.scandir(self.folder) as entries:
            for entry in entries:
                name = NAME.fullmatch(entry.name)
                # Another process may have deleted it meanwhile.
                with contextlib.suppress(OSError):
                    if name and entry.is_file():
                        about = entry.stat()
                        partial = name["partial"] is not None
                        found.append(_File(Path(entry.path), about.st_mtime, about.st_size, partial))
        return found

    def _read(self, path: Path, matrix: Tensor) -> KeptDecomposition | None:
        if not self._exists(path):
            return None
        try:
            with safe_open(str(path), framework="pt") as opened:
                header = opened.metadata() or {}
                if header.get("format") != FORMAT:
                    raise ValueError(f"format {header.get('format')!r}, wanted {FORMAT!r}")
                tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
            if header["checksum"] != _checksum(tensors):
                raise ValueError("the checksum differs")
            kept = KeptDecomposition(header["route"], tensors["sigma"], tensors.get("u"), tensors.get("vt"))
            if not kept.fits(matrix):
                raise ValueError(f"it is of another shape than the weight's {tuple(matrix.shape)}")
        except FileNotFoundError:
            # Another process has deleted it meanwhile.
            return None
        except (SafetensorError, OSError, KeyError, RuntimeError, TypeError, ValueError) as error:
            cause = f"read {error.errno}" if isinstance(error, OSError) else str(path)
            self._warn(cause, f"{path} is damaged or cannot be read ({error}); the weight is decomposed again")
            return None
        # The time of the file says when it was used last.
        try:
            os.utime(path)
        except OSError as error:
            self._warn(f"utime {error.errno}", f"that {path} was used cannot be noted ({error})")
        return kept

    def _write_or_warn(self, path: Path, kept: KeptDecomposition) -> None:
        try:
            self._write(path, kept)
        except (OSError, ValueError) as error:
            cause = f"write {error.errno}" if isinstance(error, OSError) else "write"
            self._warn(cause, f"{path} cannot be written ({error}); decompositions are made, but not kept")

    def _write(self, path: Path, kept: KeptDecomposition) -> None:
        tensors = {name: t.cpu().contiguous() for name, t in kept.tensors().items()}
        header = {"format": FORMAT, "route": kept.route, "checksum": _checksum(tensors)}
        data = save(tensors, metadata=header)
        replace_bytes(path, data)
        self._trim(path)

    def _trim(self, written: Path) -> None:
        """Deletes stale halves of files, then what was used longest ago until the folder fits; never the file just written."""
        files = self._files()
        stale = time.time() - STALE_SECONDS
        removed = [file for file in files if file.partial and file.used < stale and self._remove(file.path)]
        left = [file for file in files if file not in removed]
        excess = sum(file.bytes for file in left) - self.max_bytes if self.max_bytes else 0
        for file in sorted(left, key=lambda file: file.used):
            if excess <= 0:
                return
            if not file.partial and file.path != written and self._remove(file.path):
                excess -= file.bytes

    def _remove(self, path: Path) -> bool:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            self._warn(f"remove {error.errno}", f"{path} cannot be deleted ({error}); the cache may outgrow its limit")
            return False
        return True

    def _warn(self, cause: str, text: str) -> None:
        """Warns once a cause."""
        if cause not in self._said:
            self._said.add(cause)
            warnings.warn(f"loradash: {text}", stacklevel=2)


def _default_folder() -> Path:
    root = os.environ.get("LORADASH_CACHE")
    if root:
        return Path(root) / "spectra"
    try:
        return Path.home() / ".cache" / "loradash" / "spectra"
    except RuntimeError:
        # Users without a home are found in many containers.
        return Path(tempfile.gettempdir()) / "loradash" / "spectra"


def _choose(
    kept: KeptDecomposition, weight: Tensor, lora_a: Tensor, lora_b: Tensor, s: int, scaling: float
) -> Directions | None:
    if kept.sigma.shape[0] < s:
        return None
    return choose_directions(kept, weight, lora_a, lora_b, s, scaling=scaling)


def _bytes(t: Tensor) -> memoryview:
    return t.contiguous().flatten().view(torch.uint8).numpy().data


def _checksum(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.blake2b(digest_size=20)
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(_bytes(tensors[name]))
    return digest.hexdigest()
