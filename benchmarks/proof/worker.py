"""Goes through the units of a stage in its process: those that have ended are left out, and it stops before its time is up."""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path

from .ledger import Ledger, Row

# The ledger's path and the seconds that a process may take, in its environment.
LEDGER, SECONDS = "LORADASH_PROOF_LEDGER", "LORADASH_PROOF_SECONDS"
# Exit codes. Time was up before the end; and: go on in a new process, as this one's device is broken.
TIME_IS_UP, START_AGAIN = 75, 76

Unit = tuple[str, Callable[[], Row]]


class Deadline:
    """Until when a process may begin new work, by its environment."""

    def __init__(self, start: float | None = None) -> None:
        start = time.monotonic() if start is None else start
        self.end = start + float(os.environ.get(SECONDS, "inf"))

    @property
    def left(self) -> float:
        return self.end - time.monotonic()


def work(units: Iterable[Unit], ledger: Ledger | None = None, deadline: Deadline | None = None) -> int:
    """Runs what has not ended yet and returns the exit code: 0 or TIME_IS_UP. An exception in a unit is its failure.

    The name of a Row is its unit's, whatever the unit called it.
    """
    ledger = ledger or Ledger(Path(os.environ[LEDGER]))
    deadline = deadline or Deadline()
    done = ledger.done()
    for name, unit in units:
        if name in done:
            continue
        if deadline.left <= 0:
            return TIME_IS_UP
        ledger.start(name)
        start = time.monotonic()
        try:
            row = unit()
        except Exception as error:
            row = Row(name, "failed", detail=f"{type(error).__name__}: {error}\n{traceback.format_exc(limit=-4)}")
        row = Row(name, row.outcome, time.monotonic() - start, row.detail, row.values)
        ledger.finish(row)
        print(
            f"{row.outcome}: {name} ({row.seconds:.1f} s) {row.detail.splitlines()[0] if row.detail else ''}",
            flush=True,
        )
    return 0


def passed(detail: str = "", **values: object) -> Row:
    """A unit that passed; `work` gives it its name and time."""
    return Row("", "passed", detail=detail, values=values)


def failed(detail: str, **values: object) -> Row:
    return Row("", "failed", detail=detail, values=values)


def missing(detail: str) -> Row:
    return Row("", "missing", detail=detail)


def expect(right: bool, detail: str, **values: object) -> Row:
    """Passed or failed, with the same words and numbers."""
    return Row("", "passed" if right else "failed", detail=detail, values=values)
