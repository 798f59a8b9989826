"""Counters of a launch: what the core counts per PTX instruction, summed by class."""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

# The columns of PcStat in csrc/machine.h, in its order.
FIELDS = ("warps", "threads", "requests", "sectors", "bytes", "wavefronts", "wave_ideal")
# Which classes of instructions move data between global memory and the SM, and which way.
TRAFFIC = {
    "ld_global": "gld",
    "cp_async": "gld",
    "atom_global": "gld",
    "tma_load": "gld",
    "st_global": "gst",
    "tma_store": "gst",
}


@dataclass
class Stats:
    """Counters of one launch. Instruction counts are warp-level PTX instructions.

    insts: class -> warp instructions. gld and gst: requests, sectors, bytes and efficiency of global loads (cp.async
    included) and stores. smem: requests, wavefronts, ideal wavefronts and conflicts; by_op has the same per class.
    unique_load_bytes and unique_store_bytes: distinct 32-byte sectors read and written, a floor for DRAM traffic.
    mma_types: mma opcode -> warp instructions. touched: allocation -> (bytes read, bytes written), in whole sectors.
    """

    kernel: str
    grid: tuple[int, ...]
    block: tuple[int, ...]
    shared: int
    ctas: int
    insts: dict[str, int]
    thread_insts: int
    warp_insts: int
    mma_flops: float
    fp32_flops: float
    fp16_flops: float
    fp64_flops: float
    gld: dict[str, float]
    gst: dict[str, float]
    smem: dict[str, Any]
    atomics: int
    local_bytes: int
    unique_load_bytes: int
    unique_store_bytes: int
    mma_types: dict[str, int]
    touched: dict[str, tuple[int, int]]
    printed: str = ""
    per_pc: list[dict[str, Any]] = field(default_factory=list, repr=False)

    def per_cta(self, value: float) -> float:
        return value / self.ctas

    def hot(self, n: int = 10, by: str = "warps") -> list[dict[str, Any]]:
        """The n instructions with the largest counter `by`, as dicts with PTX and source lines."""
        return sorted(self.per_pc, key=lambda r: -r[by])[:n]

    def table(self) -> str:
        shape = f"grid {self.grid} block {self.block} shared {self.shared} B  ({self.ctas} CTAs)"
        rows = [f"{self.kernel[:60]}  {shape}", f"{'counter':34}{'total':>16}{'per CTA':>14}"]

        def row(name: str, v: float) -> None:
            rows.append(f"{name:34}{v:>16,.0f}{v / self.ctas:>14,.1f}")

        row("warp instructions", self.warp_insts)
        for c, v in sorted(self.insts.items(), key=lambda e: -e[1]):
            row("  " + c, v)
        for name in ("mma_flops", "fp32_flops", "fp16_flops", "fp64_flops"):
            if getattr(self, name):
                row(name, getattr(self, name))
        for name, d in (("global load", self.gld), ("global store", self.gst)):
            row(name + " requests", d["requests"])
            row(name + " sectors", d["sectors"])
            rows.append(f"{name + ' efficiency':34}{d['efficiency']:>16.3f}")
        row("unique bytes read", self.unique_load_bytes)
        row("unique bytes written", self.unique_store_bytes)
        row("shared wavefronts", self.smem["wavefronts"])
        row("shared bank conflicts", self.smem["conflicts"])
        for c, d in self.smem["by_op"].items():
            each = d["wavefronts"] / d["requests"]
            rows.append(f"  {c + ' wavefronts/request':32}{each:>16.3f}  ({d['conflicts']} conflicts)")
        row("atomics (warp)", self.atomics)
        row("local bytes", self.local_bytes)
        return "\n".join(rows)


def _global_traffic(per_pc: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Requests, sectors, bytes and efficiency of global loads ("gld") and stores ("gst")."""
    found: dict[str, dict[str, float]] = {way: {"requests": 0, "sectors": 0, "bytes": 0} for way in ("gld", "gst")}
    for s in per_pc:
        way = TRAFFIC.get(s["cls"])
        if way and s["sectors"]:
            found[way]["requests"] += s["warps"] if s["cls"] == "cp_async" else s["requests"]
            found[way]["sectors"] += s["sectors"]
            found[way]["bytes"] += s["bytes"]
    for counts in found.values():
        counts["efficiency"] = counts["bytes"] / (32 * counts["sectors"]) if counts["sectors"] else 0.0
    return found


def _shared_traffic(per_pc: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Requests, wavefronts, ideal wavefronts and conflicts, in all and by class."""
    by_op: dict[str, dict[str, int]] = {}
    for s in per_pc:
        if s["wavefronts"]:
            name = s["cls"] + ("(generic)" if s["cls"] in ("ld_global", "st_global") else "")
            d = by_op.setdefault(name, dict.fromkeys(("requests", "wavefronts", "ideal", "conflicts"), 0))
            d["requests"] += s["requests"]
            d["wavefronts"] += s["wavefronts"]
            d["ideal"] += s["wave_ideal"]
            d["conflicts"] += s["wavefronts"] - s["wave_ideal"]
    total = {f: sum(d[f] for d in by_op.values()) for f in ("requests", "wavefronts", "ideal", "conflicts")}
    return {**total, "by_op": by_op}


def summarise(
    kernel: str,
    grid: tuple[int, ...],
    block: tuple[int, ...],
    shared: int,
    code: Sequence[Sequence[Any]],
    files: Mapping[str, str],
    raw: np.ndarray,
    touched: dict[str, tuple[int, int]],
    printed: str,
) -> Stats:
    """Sums what the core counted: `raw` has a row for each instruction of `code` and the columns FIELDS."""
    insts: collections.Counter[str] = collections.Counter()
    mma_types: collections.Counter[str] = collections.Counter()
    flops: dict[str, float] = collections.defaultdict(int)
    per_pc: list[dict[str, Any]] = []
    for (op, cls, line, file, src, per_thread), row in zip(code, raw, strict=True):
        s: dict[str, Any] = dict(zip(FIELDS, (int(x) for x in row), strict=True))
        if not s["warps"]:
            continue
        insts[cls] += s["warps"]
        per_pc.append({"op": op, "cls": cls, "line": line, "source": (files.get(str(file)), src), **s})
        if cls == "mma":
            flops["mma"] += per_thread * s["warps"]
            mma_types[op] += s["warps"]
        elif per_thread:
            flops[cls if cls in ("fp32", "fp16", "fp64") else "fp32"] += per_thread * s["threads"]
    traffic = _global_traffic(per_pc)
    return Stats(
        kernel=kernel,
        grid=grid,
        block=block,
        shared=shared,
        ctas=grid[0] * grid[1] * grid[2],
        insts=dict(insts),
        thread_insts=int(raw[:, 1].sum()),
        warp_insts=int(raw[:, 0].sum()),
        mma_flops=flops["mma"],
        fp32_flops=flops["fp32"],
        fp16_flops=flops["fp16"],
        fp64_flops=flops["fp64"],
        gld=traffic["gld"],
        gst=traffic["gst"],
        smem=_shared_traffic(per_pc),
        atomics=insts["atom_global"] + insts["atom_shared"],
        local_bytes=sum(s["bytes"] for s in per_pc if s["cls"] in ("ld_local", "st_local")),
        unique_load_bytes=sum(read for read, _ in touched.values()),
        unique_store_bytes=sum(written for _, written in touched.values()),
        mma_types=dict(mma_types),
        touched=touched,
        printed=printed,
        per_pc=per_pc,
    )
