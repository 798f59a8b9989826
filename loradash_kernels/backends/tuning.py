"""What was measured on this machine, kept on disk: a name (GPU, versions, dtype, shape, ...) to the way that was fastest.

$LORADASH_CACHE or ~/.cache/loradash, one JSON file a backend: replaced atomically, merged with what other processes wrote,
ignored with a warning where it is damaged, kept in memory where it cannot be written. Deleting it is always safe.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Generic, TypeVar

S = TypeVar("S")


class Measurements(Generic[S]):
    """One file of them. encode and decode translate a strategy to and from JSON; decode raises ValueError, KeyError,
    TypeError or AttributeError for what it does not know."""

    def __init__(self, file: str, encode: Callable[[S], Any], decode: Callable[[Any], S]) -> None:
        self._file, self._encode, self._decode = file, encode, decode
        self._known: dict[str, S] | None = None
        self.warned: set[str] = set()

    def path(self) -> Path:
        folder = os.environ.get("LORADASH_CACHE")
        return (Path(folder) if folder else Path("~/.cache/loradash").expanduser()) / self._file

    def known(self) -> dict[str, S]:
        """What this process knows: read from disk once, then kept."""
        if self._known is None:
            self._known = self._read()
        return self._known

    def forget(self) -> None:
        """Drops what is in memory: the next call reads the file again."""
        self._known = None

    def remember(self, name: str, strategy: S) -> None:
        """Adds an entry to memory and to the file, with what other processes have added meanwhile."""
        self.known()[name] = strategy
        path = Path(self._file)
        try:
            path = self.path()
            path.parent.mkdir(parents=True, exist_ok=True)
            with _locked(path.with_suffix(".lock")):
                merged = {**self._read(), name: strategy}
                handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.stem)
                with os.fdopen(handle, "w") as file:
                    json.dump({"strategies": {k: self._encode(v) for k, v in sorted(merged.items())}}, file, indent=1)
                os.chmod(temporary, 0o644)  # a shared cache is for all its readers
                os.replace(temporary, path)
        except (OSError, RuntimeError) as error:
            self.warn(f"{path} cannot be written ({error}); measurements last as long as this process")

    def warn(self, message: str) -> None:
        """Once each."""
        if message not in self.warned:
            self.warned.add(message)
            warnings.warn(f"loradash_kernels: {message}", stacklevel=4)

    def _read(self) -> dict[str, S]:
        try:
            path = self.path()
            text = path.read_text()
        except (OSError, RuntimeError):  # not there, not readable, or no home: nothing was measured
            return {}
        try:
            return {name: self._decode(entry) for name, entry in json.loads(text)["strategies"].items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            self.warn(f"{path} is damaged ({error!r}); it is ignored and will be written anew by the next measurement")
            return {}


def fastest(
    candidates: list[S], runner: Callable[[S], Callable[[], None]], timer: Callable[[Callable[[], None]], float]
) -> S:
    """The candidate whose run takes least by the timer. Those that cannot run here are left out; RuntimeError where none can."""
    times: dict[int, float] = {}
    errors = []
    for index, strategy in enumerate(candidates):
        try:
            times[index] = timer(runner(strategy))
        except Exception as error:  # out of registers, shared memory, ...: whatever the compiler or driver says
            errors.append(f"{strategy}: {error}")
    if not times:
        raise RuntimeError("no candidate ran:\n" + "\n".join(errors))
    return candidates[min(times, key=lambda index: times[index])]


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
