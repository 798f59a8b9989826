"""Prints a hash of the emulator's sources. `make test-ptxsim` runs its own tests and records the hash they passed with."""

from __future__ import annotations

import hashlib
from pathlib import Path

ROOT = Path(__file__).with_name("ptxsim")
RECORD = ROOT / "TESTED"


def source_hash() -> str:
    digest = hashlib.sha256()
    files = (f for f in ROOT.rglob("*") if f.suffix in (".py", ".h", ".cpp", ".cu"))
    for file in sorted(files):
        digest.update(file.relative_to(ROOT).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


if __name__ == "__main__":
    RECORD.write_text(source_hash() + "\n")
    print(f"{RECORD}: {source_hash()}")
