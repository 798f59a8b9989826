"""Which of several ways to run a call is fastest here: measured once, then kept on disk.

A backend asks about its strategies, the registry about the backends: one key for a call, one clock. LORADASH_TUNE=1
measures at the first call of each key. Without a measurement of this machine a shipped one of the same card or
architecture holds (`measurements`), and without that the asker's own default.

The file is measurements-2.json in $LORADASH_CACHE or ~/.cache/loradash. Deleting it is always safe.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from .. import timing
from .._version import __version__
from ..calls import Call, ForwardCall
from ..notices import warn_once
from . import cards
from .measurements import SHIPPED_FOLDER, Key, ShippedTables, Store, write_shipped

S = TypeVar("S")
MEASURED = Store("measurements-2.json")
SHIPPED = ShippedTables(SHIPPED_FOLDER)

# Rounds of a tuning end when every candidate's spread is below 2%, or with these.
_MOST_ROUNDS, _MOST_SECONDS = 100, 5.0
_UNSEEN: Any = object()
_NO_TENSOR = (int, float, type(None))
_forced: dict[tuple[str, str], Any] = {}


def choose(
    owner: str, call: Call, candidates: Callable[[], Sequence[S]], run: Callable[[S], None], *extra: object
) -> S | None:
    """The candidate that was measured to be the fastest for such a call, or None: the default of the owner holds.

    owner: who asks. run: runs the whole call by a candidate, beginning with a write of every result: measuring runs it
    again and again. extra: what else tells calls apart; it becomes part of the key.
    """
    if _forced and (owner, call.pass_) in _forced:
        return _forced[owner, call.pass_]
    tune_now = os.environ.get("LORADASH_TUNE") == "1"
    if not tune_now and owner not in MEASURED.owners() and owner not in SHIPPED.owners():
        return None
    traits = (tune_now, *_traits(owner, call, extra))
    seen = MEASURED.chosen.get(traits, _UNSEEN)
    if seen is not _UNSEEN:
        return seen
    name = key(owner, call, *extra)
    found, best = MEASURED.known().get(name), None
    measure_now = found is None and tune_now and call.x.is_cuda and call.x.shape[0] > 0 and name not in MEASURED.failed
    if measure_now:
        # Streams, captures and events are the current device's.
        with torch.cuda.device(call.x.device):
            if torch.cuda.is_current_stream_capturing():
                return None
            best = tune(name, candidates(), run, device=call.x.device)
    else:
        found = found or SHIPPED.nearest(name)
        if found is not None:
            best = _candidate(owner, found.fastest, candidates())
    MEASURED.chosen[traits] = best
    return best


def _candidate(owner: str, fastest: str, candidates: Sequence[S]) -> S | None:
    """The candidate of this name; or None, with a warning where there is a choice, as of a table of another version."""
    best = next((c for c in candidates if str(c) == fastest), None)
    if best is None and len(candidates) > 1:
        warn_once(f"{fastest!r}, measured to be the fastest of {owner}, is no candidate here: the default holds")
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


def key(owner: str, call: Call, *extra: object) -> Key:
    """What a measurement holds for: GPU, versions, pass, dtype, M rounded up to a power of two, every other size, layouts
    of the large operands; and which tensors there are, seed of dropout and wanted gradients among them."""
    x, directions = call.x, call.dash_sigma
    return Key(
        owner=owner,
        card=cards.name_of(x.device),
        architecture=cards.architecture_of(x.device),
        versions=_versions(),
        pass_=call.pass_,
        dtype=str(x.dtype).removeprefix("torch."),
        rows=_bucket(x.shape[0]),
        k=x.shape[1],
        n=call.lora_b.shape[0],
        rank=call.lora_b.shape[1],
        directions=0 if directions is None else directions.shape[0],
        tensors=" ".join(n for n, t in zip(call._fields, call, strict=True) if not isinstance(t, _NO_TENSOR)),
        layouts=" / ".join(_layouts(call)),
        extra=" ".join(map(str, extra)),
    )


def _bucket(rows: int) -> int:
    return 1 << max(rows - 1, 0).bit_length()


def _traits(owner: str, call: Call, extra: tuple) -> tuple:
    """What tells calls of this process apart: what `key` makes its text of."""
    x = call.x
    sizes = (_bucket(x.shape[0]), x.shape[1], call.lora_b.shape, call.dash_sigma is not None and call.dash_sigma.shape)
    present = tuple([field is None for field in call])
    return owner, call.pass_, x.device, x.dtype, sizes, present, _layouts(call), extra


def _layouts(call: Call) -> tuple[str, str]:
    left = call.x if isinstance(call, ForwardCall) else call.dy
    return _layout(left), "none" if call.weight is None else _layout(call.weight)


def _layout(t: Tensor) -> str:
    """Does a matrix lie by rows or not, and does every row begin at a multiple of 16 bytes?"""
    pitch, step = t.stride()
    order = "rows" if step == 1 else "columns"
    return order + ", aligned" if t.data_ptr() % 16 == 0 and pitch * t.element_size() % 16 == 0 else order


@functools.cache
def _versions() -> str:
    found = f"{__version__}, PyTorch {torch.__version__}"
    if importlib.util.find_spec("triton") is None:
        return found
    return f"{found}, Triton {importlib.import_module('triton').__version__}"


def tune(
    name: Key,
    candidates: Sequence[S],
    run: Callable[[S], None],
    *,
    device: torch.device | str = "cuda",
    stopwatch: timing.Stopwatch | None = None,
) -> S | None:
    """Times every candidate, keeps the fastest under this key and writes the file, with times, clocks and driver.

    stopwatch: that of the device unless given. Candidates that cannot run here are left out; where none can the default is
    taken for this process, with a warning: the call itself may well fit.
    """
    # Nothing is measured where there is no choice, and nothing is noted: another candidate may come.
    if len(candidates) == 1:
        return candidates[0]
    try:
        runnable = _runnable(candidates, run)
        arms = {label: functools.partial(run, candidate) for label, candidate in runnable.items()}
        times = timing.measure(
            arms, stopwatch=stopwatch or timing.stopwatch_for(device), most=_MOST_ROUNDS, seconds=_MOST_SECONDS
        )
    except RuntimeError as error:
        warn_once(f"tuning failed, the default holds for {'/'.join(map(str, name))}: {error}")
        # In memory alone: the failure is not repeated in this process.
        MEASURED.failed.add(name)
        return None
    best = min(times, key=lambda label: times[label].median)
    details = {
        "milliseconds": {label: round(samples.median, 6) for label, samples in times.items()},
        "spread": {label: round(samples.spread, 4) for label, samples in times.items()},
        "rounds": len(times[best].milliseconds),
        "facts": timing.card_facts(device),
    }
    MEASURED.remember(name, best, details)
    return runnable[best]


def _runnable(candidates: Sequence[S], run: Callable[[S], None]) -> dict[str, S]:
    """Those that can run here, by name, each having run once and so compiled what it must; RuntimeError where none can."""
    found, errors = {}, []
    for candidate in candidates:
        try:
            run(candidate)
            found[str(candidate)] = candidate
        except Exception as error:
            # The compiler or the driver says what is short: registers, shared memory, ...
            errors.append(f"{candidate}: {error}")
    if not found:
        raise RuntimeError("no candidate ran:\n" + "\n".join(errors))
    return found


def known_of(owner: str, device: torch.device) -> str | None:
    """In words, which measurements there are of an owner's calls on this device, or None."""
    card, architecture = cards.name_of(device), cards.architecture_of(device)
    own = sum(k.owner == owner and k.card == card and k.versions == _versions() for k in MEASURED.known())
    shipped = list(SHIPPED.covers(owner, card, architecture))
    sources = sorted({SHIPPED.source(k) for k in shipped})
    parts = [f"{own} of this machine"] * (own > 0) + [f"{len(shipped)} shipped: {'; '.join(sources)}"] * bool(shipped)
    return "measurements: " + ", ".join(parts) if parts else None


def ship(path: Path, source: Mapping[str, str], store: Store | None = None) -> int:
    """Writes the measurements of a local store, those of these versions on the source's card, as a table to be shipped.

    path: of the file, which belongs in loradash_kernels/measurements. source: "card" as PyTorch names it, "driver" and
    "commit"; the versions are added. store: that of this machine unless given. Returns how many it wrote. Raises ValueError
    where there is none, or where the source lacks one.
    """
    source = {**source, "versions": _versions()}
    known = (store or MEASURED).known()
    table = {k: m for k, m in known.items() if k.card == source.get("card") and k.versions == source["versions"]}
    write_shipped(path, table, source)
    return len(table)
