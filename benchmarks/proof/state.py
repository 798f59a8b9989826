"""What is kept between calls: for every stage how it ended, how long it took, and on which sources."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .ledger import Ledger, Row
from .stage import ROOT

VERSION = 1
# "passed": every unit did. "failed": one did not, or the process ended badly. "missing": it has no command here, in words.
# "over": its budget was used up before it was through. "cut": the call ended first, the next one goes on.
ENDINGS = ("passed", "failed", "missing", "over", "cut")

# Stages whose results are files beside their rows: programs, and the table of what is fastest.
LEAVE_FILES = ("build", "tune")


class Unusable(Exception):
    """The state cannot be read or written; the message says why and what helps."""


@dataclass(frozen=True)
class Record:
    """How a stage ended. seconds and starts: of all calls together. sources: the hash of what decided the result."""

    name: str
    ending: str
    detail: str = ""
    seconds: float = 0.0
    budget: float = 0.0
    starts: int = 0
    sources: str = ""

    @property
    def finished(self) -> bool:
        return self.ending != "cut"


class State:
    """The records of a card, in a file that is replaced as a whole."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / "state.json"
        self.records: dict[str, Record] = {}
        self.facts: dict[str, Any] = {}

    def load(self) -> State:
        """Raises Unusable for a file that cannot be read."""
        help_ = f"move {self.folder} away, or begin anew with --again all"
        try:
            if not self.path.exists():
                return self
            found = json.loads(self.path.read_text())
            if found["version"] != VERSION:
                raise ValueError(f"version is {found['version']}, wanted {VERSION}")
            self.records = {record["name"]: Record(**record) for record in found["records"]}
            self.facts = found["facts"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise Unusable(f"cannot read {self.path} ({error}); {help_}") from error
        return self

    def save(self) -> None:
        """Raises Unusable where it cannot be written, as on a full disk."""
        records = [dataclasses.asdict(record) for record in self.records.values()]
        text = json.dumps({"version": VERSION, "facts": self.facts, "records": records}, indent=1)
        new = self.path.with_suffix(".new")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            new.write_text(text)
            os.replace(new, self.path)
        except OSError as error:
            raise Unusable(
                f"cannot write {self.path}: {error.strerror}; results so far are in {self.folder}"
            ) from error

    def put(self, record: Record) -> None:
        self.records[record.name] = record
        self.save()


def restore(folder: Path, proof: Path) -> None:
    """Lays the state that a proof.json holds back into `folder`, so that another machine goes on with it. What a stage left in
    files of its own is not there: it runs again.

    Raises Unusable where the file is no proof."""
    try:
        found = json.loads(proof.read_text())
        state = State(folder)
        state.facts = found["facts"]
        for stage in found["stages"]:
            rows = stage.pop("rows")
            if stage["name"] in LEAVE_FILES:
                continue
            state.records[stage["name"]] = Record(**stage)
            shutil.rmtree(folder / stage["name"], ignore_errors=True)
            ledger = Ledger(folder / stage["name"] / "rows.jsonl")
            for row in rows:
                ledger.finish(Row(**row))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Unusable(f"cannot go on from {proof}: {error!r}") from error
    state.save()


def hash_of(paths: Iterable[str], root: Path = ROOT) -> str:
    """A hash of the files at and below some paths, whatever their times; compiled files do not count."""
    digest = hashlib.sha256()
    for path in sorted(paths):
        top = root / path
        files = [top] if top.is_file() else sorted(top.rglob("*"))
        for file in files:
            if file.is_file() and "__pycache__" not in file.parts and file.suffix not in (".so", ".pyc"):
                digest.update(f"{file.relative_to(root)}\0".encode() + file.read_bytes())
    return digest.hexdigest()[:16]
