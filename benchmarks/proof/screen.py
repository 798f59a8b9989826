"""What the user sees while stages run: which one, how long, of how many seconds, and what it said last."""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path
from typing import TextIO

# Where nobody watches, a line every so many seconds says that it goes on.
QUIET_SECONDS = 20.0


class Screen:
    """A line that is rewritten on a terminal, and single lines elsewhere."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = stream or sys.stdout
        self.live = self.stream.isatty()
        self.last = time.monotonic()

    def say(self, text: str) -> None:
        self._write(f"\r\033[K{text}\n" if self.live else f"{text}\n")
        self.last = time.monotonic()

    def progress(self, stage: str, seconds: float, budget: float, said: str) -> None:
        if not self.live and time.monotonic() - self.last < QUIET_SECONDS:
            return
        text = f"  {stage}: {clock(seconds)} of {clock(budget)}  {said}"
        if self.live:
            self._write(f"\r\033[K{text[: shutil.get_terminal_size().columns - 1]}")
        else:
            self.say(text[:160])

    def _write(self, text: str) -> None:
        self.stream.write(text)
        self.stream.flush()


def clock(seconds: float) -> str:
    """Minutes and seconds, as 4:07."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def last_lines(path: Path, count: int = 1) -> list[str]:
    """The last lines of a file that say anything."""
    if not path.exists():
        return []
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 200 * count - 2000))
        text = file.read().decode(errors="replace")
    return [line.strip() for line in text.replace("\r", "\n").splitlines() if line.strip()][-count:]


def last_line(path: Path) -> str:
    return "".join(last_lines(path))
