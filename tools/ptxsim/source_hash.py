"""Records a hash of the emulator's sources and tests when these have passed; with --check, fails unless it still holds."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

ROOT = Path(__file__).parent
RECORD = ROOT / "TESTED"
SOURCES = (".py", ".h", ".c", ".cpp", ".cu")


def source_hash() -> str:
    digest = hashlib.sha256()
    files = (f for room in ("ptxsim", "tests") for f in (ROOT / room).rglob("*") if f.suffix in SOURCES)
    for file in sorted(files):
        digest.update(file.relative_to(ROOT).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


if __name__ == "__main__":
    if "--check" in sys.argv:
        sys.exit(not RECORD.is_file() or RECORD.read_text().strip() != source_hash())
    RECORD.write_text(source_hash() + "\n")
    print(f"{RECORD}: {source_hash()}")
