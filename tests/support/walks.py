"""The files that a call goes down through."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).parents[2]
PACKAGES = (ROOT / "loradash_kernels", ROOT / "python")


def walks(call: Callable[[], Any]) -> set[tuple[str, ...]]:
    """Every chain of this project's files that was on the stack while `call` ran, outermost first.

    Frames that follow each other in one file count once; those of other packages between them do not count.
    """
    found: set[tuple[str, ...]] = set()
    names: dict[str, str | None] = {}

    def name_of(file: str) -> str | None:
        if file not in names:
            path = Path(file)
            inside = any(package in path.parents for package in PACKAGES)
            names[file] = path.relative_to(ROOT).as_posix() if inside else None
        return names[file]

    def record(frame: FrameType | None, event: str, _: Any) -> None:
        if event != "call" or frame is None or name_of(frame.f_code.co_filename) is None:
            return
        chain: list[str] = []
        while frame is not None:
            name = name_of(frame.f_code.co_filename)
            if name is not None and (not chain or chain[-1] != name):
                chain.append(name)
            frame = frame.f_back
        found.add(tuple(reversed(chain)))

    before = sys.getprofile()
    sys.setprofile(record)
    try:
        call()
    finally:
        sys.setprofile(before)
    return found


def repeated(chains: set[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Those chains that come back to a file which they had left."""
    return sorted(chain for chain in chains if len(set(chain)) < len(chain))
