"""The two errors of the emulator: PTX that cannot be loaded, and a kernel that does something wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def _source_line(text: str, line: int) -> str:
    lines = text.splitlines()
    return lines[line - 1].strip() if 0 < line <= len(lines) else ""


class PtxError(Exception):
    """The PTX could not be loaded: a syntax error or an unsupported instruction. `line` is the PTX line."""

    def __init__(self, message: str, line: int = 0, text: str = "") -> None:
        self.line = line
        source = _source_line(text, line)
        shown = f"\n    {source[:200]}" if source else ""
        super().__init__(f"PTX line {line}: {message}{shown}" if line else message)


class SimError(Exception):
    """The emulated kernel did something wrong; every field says where.

    kind: out-of-bounds, misaligned, uninitialised, cp.async, shared-race, global-race, deadlock, trap, assert, mma,
    membermask, barrier; on sm_90 also cp.async.bulk, async-read, wgmma, proxy, mbarrier, tensormap.
    """

    def __init__(
        self, kernel: str, info: Mapping[str, Any], files: Mapping[str, str], text: str, block: Sequence[int]
    ) -> None:
        self.kind, self.kernel = info["error"], kernel
        self.line, self.opcode = info["line"], info["opcode"]
        self.cta, self.warp = tuple(info["cta"]), info["warp"]
        t = info["thread"]
        self.thread = None if t < 0 else (t % block[0], t // block[0] % block[1], t // block[0] // block[1])
        self.source = f"{files.get(str(info['file']), '?')}:{info['src_line']}" if info["src_line"] else None
        who = f"thread {self.thread}" if self.thread else f"warp {self.warp}"
        where = f"\n  source {self.source}" if self.source else ""
        super().__init__(
            f"[{self.kind}] {info['message']}\n  in kernel {kernel[:120]}, PTX line {self.line}: "
            f"{_source_line(text, self.line)[:160]}{where}\n  CTA {self.cta}, {who}"
        )
