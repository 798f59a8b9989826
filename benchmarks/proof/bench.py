"""The benchmarks of layers on the device, and their rows in the ledger as they are measured.

    python -m benchmarks.proof.bench [--rehearse]

It starts `python -m benchmarks.layers.device` and copies what that appends to its file of rows. Where the ledger knows rows
that the file lacks, as after a move to another machine, the file gets them first, so that they are not measured again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from .ledger import Ledger, Row, rows_in
from .stage import ROOT
from .worker import LEDGER, Deadline

MODULE = "benchmarks.layers.device"
# How the arms of our own layer begin.
OURS = "ours"
FILE = "rows.jsonl"
PAUSE = 0.5


def row_of(values: dict[str, Any]) -> Row:
    """A row of the benchmarks, as a unit. An error is a failure where it is ours; a peer's was not measured, and neither was
    what the card has no room for or a backend refuses."""
    error, left_out = values["error"], values["left out"]
    ours = values["kind"] == "strategy" or values["arm"].startswith(OURS)
    outcome = "missing" if left_out else "measured" if error is None else "failed" if ours else "missing"
    return Row(values["key"], outcome, detail=error or left_out or "", values=values)


def copy(file: Path, ledger: Ledger, begin: int) -> int:
    """Copies the whole lines from byte `begin` on, and returns where it ended."""
    if not file.exists():
        return begin
    text = file.read_bytes()[begin:]
    whole = text[: text.rfind(b"\n") + 1]
    for line in whole.splitlines():
        if line.strip():
            ledger.finish(row_of(json.loads(line)))
    return begin + len(whole)


def give_back(file: Path, rows: list[Row]) -> None:
    """Rows that were measured before, for a file that is not there."""
    if rows and not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(f"{json.dumps(row.values)}\n" for row in rows if row.outcome == "measured"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rehearse", action="store_true")
    options = parser.parse_args()
    ledger, deadline = Ledger(Path(os.environ[LEDGER])), Deadline()
    folder = ledger.path.parent / "measured"
    file = folder / FILE
    give_back(file, rows_in(ledger.path.parent))
    begin = file.stat().st_size if file.exists() else 0
    argv = [sys.executable, "-m", MODULE, "--out", str(folder), "--seconds", f"{deadline.left:.0f}"]
    # Where the card has gone, the CPU must not be measured in its place.
    process = subprocess.Popen([*argv, *(["--rehearse"] if options.rehearse else ["--device", "cuda"])], cwd=ROOT)
    while process.poll() is None:
        time.sleep(PAUSE)
        begin = copy(file, ledger, begin)
    copy(file, ledger, begin)
    # Its exit codes are this proof's: TIME_IS_UP, and START_AGAIN where the card no longer answers.
    return process.returncode


if __name__ == "__main__":
    sys.exit(main())
