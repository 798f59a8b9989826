"""Runs a process, with all its children, within a budget. Knows nothing of stages."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

# Every process that a stage starts inherits this, also one that leaves the process group.
TOKEN = "LORADASH_PROOF_TOKEN"
# How long a process that is asked to stop may take to put its results down.
GRACE = 3.0


@dataclass(frozen=True)
class Ended:
    """How a process ended. how: "exit", "budget", "stalled" or "interrupted"; code: as subprocess gives it."""

    how: str
    code: int
    seconds: float

    def __str__(self) -> str:
        if self.how == "budget":
            return f"killed after {self.seconds:.0f} s: its budget was used up"
        if self.how == "stalled":
            return f"killed after {self.seconds:.0f} s: it hung, with no sign of life"
        if self.how == "interrupted":
            return "interrupted"
        return f"exit code {self.code}" if self.code >= 0 else f"crashed: {signal_name(-self.code)}"


def signal_name(number: int) -> str:
    """ "SIGSEGV (segmentation fault)", or "signal 77"."""
    try:
        return f"{signal.Signals(number).name} ({(signal.strsignal(number) or 'signal').lower()})"
    except ValueError:
        return f"signal {number}"


class Process:
    """A program that is running: `poll` it now and then until it returns how it ended.

    stdout and stderr are appended to `log`. Raises OSError where that cannot be written or there is no such program.

    Args:
        budget: seconds. patience: seconds in which neither `log` grows nor `signs` returns something new.
    """

    def __init__(
        self,
        argv: Sequence[str],
        log: Path,
        *,
        budget: float,
        patience: float = float("inf"),
        signs: Callable[[], object] = lambda: None,
        environment: Mapping[str, str] | None = None,
        folder: Path | None = None,
    ) -> None:
        self._log, self._signs = log, signs
        self._seen: object = None
        self._budget, self._patience, self._token = budget, patience, uuid.uuid4().hex
        self._start = self._alive = time.monotonic()
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=folder,
                env={**os.environ, **(environment or {}), TOKEN: self._token},
                start_new_session=True,
            )

    def poll(self) -> Ended | None:
        """None while it runs. Kills it, with whatever it started, when its time is over or it shows no sign of life."""
        now = time.monotonic()
        if self._process.poll() is not None:
            # What it left behind would run beside the next one.
            return self.stop("exit")
        sign = (self._log.stat().st_size, self._signs())
        if sign != self._seen:
            self._seen, self._alive = sign, now
        if now - self._start > self._budget:
            return self.stop("budget")
        return self.stop("stalled") if now - self._alive > self._patience else None

    def stop(self, how: str = "interrupted") -> Ended:
        """Asks the process to stop, then kills it, its group, and every process that carries its token."""
        if self._process.poll() is None:
            signal_group(self._process.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(GRACE)
        signal_group(self._process.pid, signal.SIGKILL)
        for pid in carriers(self._token):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        return Ended(how, self._process.wait(), time.monotonic() - self._start)


def signal_group(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


def carriers(token: str) -> list[int]:
    """Processes whose environment holds the token: children of children, whatever group or session they moved to."""
    wanted, found = f"{TOKEN}={token}".encode(), []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if wanted in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
    return found
