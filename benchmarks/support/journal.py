"""Rows of a program that may be cut at any time: one JSON object a line, on disk before the next is measured."""

from __future__ import annotations

import collections
import json
import os
from pathlib import Path
from typing import Any

Row = dict[str, Any]
# What was begun so often and never ended has hung the program or brought it down.
ATTEMPTS = 2


def read_lines(path: Path) -> list[Row]:
    """The objects of a file, without a last line that was cut; none where there is no file."""
    if not path.is_file():
        return []
    whole, _, _ = path.read_text().rpartition("\n")
    return [json.loads(line) for line in whole.splitlines() if line]


def append_line(path: Path, row: Row) -> None:
    """Adds an object as a line of its own, after what a cut may have left of another, and waits for the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                _drop_cut_line(file)
        file.write(json.dumps(row, allow_nan=False).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def _drop_cut_line(file: Any) -> None:
    file.seek(0)
    file.truncate(file.read().rfind(b"\n") + 1)


class Journal:
    """rows.jsonl of a folder, and begun.jsonl: what was tried, so that what brings the program down is not tried for ever.

    A row has a "key", which stands once.
    """

    def __init__(self, folder: Path) -> None:
        self.path, self._begun = folder / "rows.jsonl", folder / "begun.jsonl"
        self.rows = read_lines(self.path)
        self.keys = {row["key"] for row in self.rows}
        # The attempts that never ended.
        self._open: collections.Counter[str] = collections.Counter()
        for line in read_lines(self._begun):
            self._open[line["key"]] += -1 if line["ended"] else 1

    def add(self, row: Row) -> None:
        append_line(self.path, row)
        self.rows.append(row)
        self.keys.add(row["key"])

    def begin(self, key: str) -> None:
        """Notes that something is about to be tried."""
        append_line(self._begun, {"key": key, "ended": False})

    def end(self, key: str) -> None:
        """Notes that it left the program alive, well or not."""
        append_line(self._begun, {"key": key, "ended": True})

    def ends_the_program(self, key: str) -> bool:
        """Did earlier programs begin it, ATTEMPTS times, and not live to end it?"""
        return self._open[key] >= ATTEMPTS
