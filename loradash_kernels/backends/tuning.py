"""Which of several ways to run a call is fastest here: measured once, then kept on disk.

A backend asks about its tiles, the registry about the backends: one key for a call, one file, one clock. LORADASH_TUNE=1
measures at the first call of each key; without a measurement the asker's own table or order decides.

The file is measurements-1.json in $LORADASH_CACHE or ~/.cache/loradash: replaced atomically, merged with what other
processes wrote, ignored with a warning where it is damaged, kept in memory where it cannot be written. Deleting it is
always safe.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from .._version import __version__
from ..calls import Call, ForwardCall
from ..files import replace_bytes
from ..notices import warn_once

S = TypeVar("S")
# No card's L2 cache holds so many bytes.
_FLUSHED_BYTES = 1 << 28
_ROUNDS = 10
_UNSEEN: Any = object()


class Measurements:
    """A file that maps a key to the candidate that was fastest, by its str()."""

    def __init__(self, file: str) -> None:
        self._file = file
        self._known: dict[str, str] | None = None
        # Calls that were seen before are found by their traits: making the text of a key would take longer.
        self.chosen: dict[tuple, Any] = {}

    def path(self) -> Path:
        folder = os.environ.get("LORADASH_CACHE")
        return (Path(folder) if folder else Path("~/.cache/loradash").expanduser()) / self._file

    def known(self) -> dict[str, str]:
        """What this process knows: read from disk once, then kept."""
        if self._known is None:
            self._known = self._read()
        return self._known

    def forget(self) -> None:
        """Drops what is in memory: the next call reads the file again."""
        self._known = None
        self.chosen.clear()

    def remember(self, key: str, name: str) -> None:
        """Adds an entry to memory and to the file, with what other processes have added meanwhile."""
        self.known()[key] = name
        self.chosen.clear()
        path = Path(self._file)
        try:
            path = self.path()
            path.parent.mkdir(parents=True, exist_ok=True)
            with _locked(path.with_suffix(".lock")):
                text = json.dumps({"fastest": {**self._read(), key: name}}, indent=1, sort_keys=True)
                replace_bytes(path, text.encode())
                # A shared cache is for all its readers.
                path.chmod(0o644)
        except (OSError, RuntimeError) as error:
            warn_once(f"{path} cannot be written ({error}); measurements last as long as this process")

    def _read(self) -> dict[str, str]:
        try:
            path = self.path()
            text = path.read_bytes()
        except (OSError, RuntimeError):
            # The file is not there or not readable, or there is no home: nothing was measured.
            return {}
        try:
            found = json.loads(text)["fastest"]
            if not all(isinstance(name, str) for name in found.values()):
                raise ValueError("a name is not a string")
            return found
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            warn_once(f"{path} is damaged ({error!r}); it is ignored and will be written anew by the next measurement")
            return {}


MEASURED = Measurements("measurements-1.json")
_forced: dict[tuple[str, str], Any] = {}


def choose(
    owner: str, call: Call, candidates: Callable[[], Sequence[S]], run: Callable[[S], None], *extra: object
) -> S | None:
    """The candidate that was measured to be the fastest for such a call, or None: the default of the owner holds.

    owner: who asks. run: runs the whole call by a candidate; measuring writes the call's results again and again.
    extra: what else tells calls apart; it becomes part of the key.
    """
    if _forced and (owner, call.pass_) in _forced:
        return _forced[owner, call.pass_]
    tune_now = os.environ.get("LORADASH_TUNE") == "1"
    if not tune_now and not MEASURED.known():
        return None
    traits = (tune_now, *_traits(owner, call, extra))
    seen = MEASURED.chosen.get(traits, _UNSEEN)
    if seen is not _UNSEEN:
        return seen
    name = key(owner, call, *extra)
    found, best = MEASURED.known().get(name), None
    if found is not None:
        best = next((c for c in candidates() if str(c) == found), None)
    elif tune_now and call.x.is_cuda and call.x.shape[0] > 0:
        # Streams, captures and events are the current device's.
        with torch.cuda.device(call.x.device):
            if torch.cuda.is_current_stream_capturing():
                return None
            best = tune(name, candidates(), run)
    MEASURED.chosen[traits] = best
    return best


@contextlib.contextmanager
def forced(owner: str, **candidates: Any) -> Iterator[None]:
    """Calls within take these: forced("triton", forward=..., backward=...)."""
    before = dict(_forced)
    _forced.update({(owner, pass_): candidate for pass_, candidate in candidates.items()})
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(before)


def key(owner: str, call: Call, *extra: object) -> str:
    """What a measurement holds for: GPU, versions, dtype, layouts of the large operands, M rounded up to a power of two,
    every other size; and which tensors there are, seed of dropout and wanted gradients among them."""
    _, fields, device, dtype, rows, sizes, layouts, _ = _traits(owner, call, extra)
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    tensors = " ".join(f"{name}:{size}" for name, size in zip(fields, sizes, strict=True) if size is not None)
    parts = (owner, card, _versions(), call.pass_, dtype, rows, tensors, " ".join(layouts), *extra)
    return "/".join(map(str, parts))


def _traits(owner: str, call: Call, extra: tuple) -> tuple:
    """What tells calls of this process apart, the sizes of their tensors field by field."""
    x = call.x
    rows = 1 << max(x.shape[0] - 1, 0).bit_length()
    sizes = tuple(t.shape[-1] if isinstance(t, Tensor) else None for t in call)
    left = call.x if isinstance(call, ForwardCall) else call.dy
    layouts = (_layout(left), "none" if call.weight is None else _layout(call.weight))
    return owner, call._fields, x.device, x.dtype, rows, sizes, layouts, extra


def _layout(t: Tensor) -> str:
    """Does a matrix lie by rows or not, and does every row begin at a multiple of 16 bytes?"""
    order = "rows" if t.stride(1) == 1 else "columns"
    return order + ", aligned" if t.data_ptr() % 16 == 0 and t.stride(0) * t.element_size() % 16 == 0 else order


@functools.cache
def _versions() -> str:
    if importlib.util.find_spec("triton") is None:
        return __version__
    return f"{__version__}, Triton {importlib.import_module('triton').__version__}"


def tune(
    name: str,
    candidates: Sequence[S],
    run: Callable[[S], None],
    timer: Callable[[Callable[[], None]], float] | None = None,
) -> S | None:
    """Times every candidate, keeps the fastest under this key and writes the file.

    timer: seconds (or any unit) of a callable; `milliseconds` unless given. Where no candidate runs the default is taken
    for this process, with a warning: the call itself may well fit.
    """
    # Nothing is measured where there is no choice, and nothing is noted: another candidate may come.
    if len(candidates) == 1:
        return candidates[0]
    try:
        best = _fastest(candidates, run, timer or milliseconds)
    except RuntimeError as error:
        warn_once(f"tuning failed, the table decides for {name}: {error}")
        # A name that no candidate has, in memory alone: the failure is not repeated in this process.
        MEASURED.known()[name] = ""
        return None
    MEASURED.remember(name, str(best))
    return best


def _fastest(candidates: Sequence[S], run: Callable[[S], None], timer: Callable[[Callable[[], None]], float]) -> S:
    """Those that cannot run here are left out; RuntimeError where none can."""
    times: dict[int, float] = {}
    errors = []
    for index, candidate in enumerate(candidates):
        try:
            times[index] = timer(functools.partial(run, candidate))
        except Exception as error:
            # The compiler or the driver says what is short: registers, shared memory, ...
            errors.append(f"{candidate}: {error}")
    if not times:
        raise RuntimeError("no candidate ran:\n" + "\n".join(errors))
    return candidates[min(times, key=lambda index: times[index])]


def milliseconds(run: Callable[[], None]) -> float:
    """The time of one run by CUDA events: the median of some rounds, after one that compiles and tunes what it must.

    Before each round the L2 cache is overwritten: operands come from memory, as in a model. As long as that takes, about
    0.1 ms, the launching of the run is hidden behind it.
    """
    run()
    flushed = torch.empty(_FLUSHED_BYTES, dtype=torch.int8, device="cuda")
    times = []
    for _ in range(_ROUNDS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flushed.zero_()
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[_ROUNDS // 2]


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds an advisory lock, where the system has them: two processes must not both read, then both replace."""
    with open(path, "a") as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        except ImportError:
            pass
        yield
