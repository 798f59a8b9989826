"""What was measured: the key of a call, the store of this machine, and the tables that ship with the package.

Both kinds of file hold the same list of measurements, a shipped one its source besides; measurements/README.md states the
format. A damaged file is ignored with a warning.
"""

from __future__ import annotations

import abc
import contextlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ..files import replace_bytes
from ..notices import warn_once

SHIPPED_FOLDER = Path(__file__).parents[1] / "measurements"

# Ranks are padded to multiples of this or more.
_RANKS = 32
_UNKNOWN = "unknown"
SOURCE = ("card", "driver", "versions", "commit")
"""What a shipped file must say of where it comes from."""


class Key(NamedTuple):
    """What a measurement holds for."""

    owner: str  # who asked: the name of a backend, or "backend" where backends were compared
    card: str
    architecture: str  # sm_80, gfx942, ...; "cpu" in Triton's interpreter
    versions: str
    pass_: str
    dtype: str  # of x
    rows: int  # M, rounded up to a power of two
    k: int
    n: int
    rank: int
    directions: int
    tensors: str  # the names of those that there are: seed of dropout, bias and wanted gradients among them
    layouts: str  # of the large operands
    extra: str  # what else the owner tells apart

    @property
    def padded_width(self) -> int:
        """r + s as kernels pad it: 0, or a power of two from 32 on."""
        width = self.rank + self.directions
        return 0 if width == 0 else max(_RANKS, 1 << (width - 1).bit_length())


_NUMBERS = ("rows", "k", "n", "rank", "directions")


class Measurement(NamedTuple):
    """The candidate that was fastest, by its str(), and what else was noted: times, clocks, driver."""

    fastest: str
    details: Mapping[str, Any]


Table = dict[Key, Measurement]


def to_json(table: Table) -> list[dict[str, Any]]:
    """One object a measurement: the fields of its key, `fastest`, and the details."""
    return [{**key._asdict(), "fastest": m.fastest, "details": dict(m.details)} for key, m in sorted(table.items())]


def from_json(entries: Any) -> Table:
    """The table of such a list. Raises ValueError for what is not one."""
    if not isinstance(entries, list):
        raise ValueError(f"measurements are {type(entries).__name__}, wanted a list")
    table: Table = {}
    for entry in entries:
        if not isinstance(entry, dict) or not {*Key._fields, "fastest"} <= entry.keys():
            raise ValueError(f"a measurement lacks one of {', '.join(Key._fields)}, fastest: {entry!r}")
        fields = [entry[name] for name in Key._fields]
        for name, value in zip(Key._fields, fields, strict=True):
            if type(value) is not (wanted := int if name in _NUMBERS else str):
                raise ValueError(f"{name} is {value!r}, wanted {wanted.__name__}")
        details = entry.get("details", {})
        if not isinstance(entry["fastest"], str) or not isinstance(details, dict):
            raise ValueError(f"fastest is {entry['fastest']!r}, details are {details!r}; wanted a name and an object")
        table[Key(*fields)] = Measurement(entry["fastest"], details)
    return table


class _Tables(abc.ABC):
    """What a process knows: read once, then kept."""

    def __init__(self) -> None:
        self._known: Table | None = None
        self._owners: set[str] | None = None

    def known(self) -> Table:
        """Every measurement, read from disk at the first call."""
        if self._known is None:
            self._known = self._read_all()
        return self._known

    def owners(self) -> set[str]:
        """Of whom something is known: every call asks."""
        if self._owners is None:
            self._owners = {key.owner for key in self.known()}
        return self._owners

    def forget(self) -> None:
        """Drops what is in memory: the next call reads the files again."""
        self._known = self._owners = None

    @abc.abstractmethod
    def _read_all(self) -> Table:
        """Every measurement on disk."""


class Store(_Tables):
    """The measurements of this machine, in a file: replaced atomically, merged with what other processes wrote, kept in
    memory where it cannot be written."""

    def __init__(self, file: str) -> None:
        super().__init__()
        self._file = file
        # Calls that were seen before are found by their traits: making a key would take longer.
        self.chosen: dict[tuple, Any] = {}
        # Keys of which no candidate ran in this process.
        self.failed: set[Key] = set()

    def path(self) -> Path:
        folder = os.environ.get("LORADASH_CACHE")
        return (Path(folder) if folder else Path("~/.cache/loradash").expanduser()) / self._file

    def forget(self) -> None:
        super().forget()
        self.chosen.clear()
        self.failed.clear()

    def remember(self, key: Key, name: str, details: Mapping[str, Any] | None = None) -> None:
        """Adds an entry to memory and to the file, with what other processes have added meanwhile."""
        measurement = Measurement(name, details or {})
        self.known()[key] = measurement
        self._owners = None
        self.chosen.clear()
        path = Path(self._file)
        try:
            path = self.path()
            path.parent.mkdir(parents=True, exist_ok=True)
            with _locked(path.with_suffix(".lock")):
                table = {**self._read_all(), key: measurement}
                replace_bytes(path, json.dumps({"measurements": to_json(table)}, indent=1).encode())
                # A shared cache is for all its readers.
                path.chmod(0o644)
        except (OSError, RuntimeError) as error:
            warn_once(f"{path} cannot be written ({error}); measurements last as long as this process")

    def _read_all(self) -> Table:
        try:
            path = self.path()
            text = path.read_bytes()
        except (OSError, RuntimeError):
            # The file is not there or not readable, or there is no home: nothing was measured.
            return {}
        try:
            return from_json(json.loads(text)["measurements"])
        except (ValueError, KeyError, TypeError) as error:
            warn_once(f"{path} is damaged ({error!r}); it is ignored and will be written anew by the next measurement")
            return {}


class ShippedTables(_Tables):
    """The files of a folder, each with the source of its measurements."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder
        self._sources: dict[Key, Mapping[str, str]] = {}

    def forget(self) -> None:
        super().forget()
        self._sources = {}

    def covers(self, owner: str, card: str, architecture: str) -> Iterator[Key]:
        """The keys of an owner that could hold for this card: its own, or those of its architecture."""
        return (k for k in self.known() if k.owner == owner and (k.card == card or k.architecture == architecture))

    def nearest(self, key: Key) -> Measurement | None:
        """That of the nearest problem that was measured on this card, or failing that on its architecture, or None.

        Owner, pass, dtype, layouts, the bucket of M and the padded r + s are the same; K and N each the same or within a
        factor of 2; of those equally near the one whose tensors differ least.
        """
        near = [
            (found.card != key.card, distance, len({*found.tensors.split()} ^ {*key.tensors.split()}), found)
            for found in self.covers(key.owner, key.card, key.architecture)
            if _same_kind(found, key) and (distance := _distance(found, key)) is not None
        ]
        return self.known()[min(near)[-1]] if near else None

    def source(self, key: Key) -> str:
        """In words, where a shipped measurement comes from."""
        return ", ".join(f"{name} {value}" for name, value in self._sources[key].items())

    def _read_all(self) -> Table:
        """Where two files have the same key, the last by name holds."""
        found: Table = {}
        for path in sorted(self._folder.glob("*.json")):
            found |= self._read(path)
        return found

    def _read(self, path: Path) -> Table:
        try:
            found = json.loads(path.read_bytes())
            missing = [name for name in SOURCE if not isinstance(found["source"][name], str)]
            if missing:
                raise ValueError(f"{', '.join(missing)} of its source are no text")
            table = from_json(found["measurements"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            warn_once(f"{path} is damaged ({error!r}); its measurements are ignored")
            return {}
        source = {name: found["source"][name] for name in SOURCE}
        self._sources |= dict.fromkeys(table, source)
        return table


def _same_kind(found: Key, key: Key) -> bool:
    def kind(k: Key) -> tuple:
        return k.pass_, k.dtype, k.layouts, k.extra, k.rows, k.padded_width

    return kind(found) == kind(key)


def _distance(found: Key, key: Key) -> float | None:
    """How many doublings K and N are apart together; None where one of them is more than a factor of 2 apart."""
    total = 0.0
    for ours, other in ((found.k, key.k), (found.n, key.n)):
        if ours == other:
            continue
        if max(ours, other) > 2 * min(ours, other):
            return None
        total += abs(math.log2(ours / other))
    return total


def write_shipped(path: Path, table: Table, source: Mapping[str, str]) -> None:
    """Writes a file for the folder of shipped tables. Raises ValueError where the source or every measurement is missing."""
    lacking = [name for name in SOURCE if not source.get(name) or source[name] == _UNKNOWN]
    if lacking:
        raise ValueError(f"source lacks {', '.join(lacking)}, got {dict(source)}")
    if not table:
        raise ValueError("there is no measurement to ship")
    text = json.dumps({"source": dict(source), "measurements": to_json(table)}, indent=1)
    replace_bytes(path, f"{text}\n".encode())


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
