"""What a stage has done so far: one line of JSON when a unit starts and one when it ends, so that a process may die anywhere.

A unit is a test, a run of a sanitizer, a shape that is measured. Units that have ended are not repeated.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

OUTCOMES = ("passed", "failed", "missing", "measured")


@dataclass(frozen=True)
class Row:
    """A unit that ended. outcome: one of OUTCOMES; "missing" says in `detail` why nothing was run. values: what was measured."""

    name: str
    outcome: str
    seconds: float = 0.0
    detail: str = ""
    values: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.outcome not in OUTCOMES:
            raise ValueError(f"outcome must be one of {OUTCOMES}, got {self.outcome!r}")


class Ledger:
    """A file of units: `begin`, `start` and `finish` append to it; `rows` and `open` read it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def begin(self) -> None:
        """A process begins: what an earlier one left open is no longer its concern."""
        self._append({"begin": True})

    def start(self, name: str) -> None:
        self._append({"start": name})

    def finish(self, row: Row) -> None:
        self._append({"row": dataclasses.asdict(row)})

    def rows(self) -> list[Row]:
        """Every unit that ended, by its last ending, in the order of first endings."""
        return list({row["name"]: Row(**row) for line in self._lines() if (row := line.get("row"))}.values())

    def open(self) -> list[str]:
        """Units of the last process that started and have not ended: it was killed or died in them."""
        waiting: dict[str, None] = {}
        for line in self._lines():
            if "begin" in line:
                waiting.clear()
            elif "start" in line:
                waiting[line["start"]] = None
            elif "row" in line:
                waiting.pop(line["row"]["name"], None)
        return [*waiting]

    def done(self) -> set[str]:
        """Names of the units that have ended, in this ledger and in those of the processes beside this one."""
        return {row.name for row in rows_in(self.path.parent)}

    def _lines(self) -> list[dict[str, Any]]:
        """A line that is no JSON was torn when its writer died. It says nothing, so its unit is done once more."""
        lines = self.path.read_text(errors="replace").splitlines() if self.path.exists() else []
        found = []
        for line in lines:
            with contextlib.suppress(ValueError):
                found.append(json.loads(line))
        return [line for line in found if isinstance(line, dict)]

    def _append(self, line: dict[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # A line of its own also after a torn one: the blank lines between say nothing.
        with self.path.open("a") as file:
            file.write(f"\n{json.dumps(line)}\n")


def rows_in(folder: Path) -> list[Row]:
    """Every unit that has ended by the ledgers of a folder, one for each process that ran side by side."""
    found = {row.name: row for path in sorted(folder.glob("rows*.jsonl")) for row in Ledger(path).rows()}
    return [*found.values()]
