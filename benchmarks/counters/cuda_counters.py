"""What the CUDA kernels execute, counted by the emulator, and the bounds that follow for two cards. No GPU is used.

    python -m benchmarks.counters.cuda_counters [--out benchmarks/results]

1. The product's tiles beside CUTLASS's sm_80 GEMM of the same tile (pip install --no-deps nvidia-cutlass==4.2.0.0), one run.
2. The passes: bytes over those of their one large operand.
3. The products of a call without W, which go before a library's product: bytes over those of their output, by tile.
4. MODELLED, for an A100 and an RTX 3090: the sum of our launches' bounds over the bound of the frozen product alone, at
   LLaMA-7B shapes. Every launch is emulated at two small depths; its counters are lines in the depth, which are continued
   to the full size. A bound is the busiest resource of the card at its published rate (ptxsim/model.py in tools/ptxsim):
   latency, fill and drain cost nothing.
"""

from __future__ import annotations

import argparse
import collections
import copy
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ptxsim
import torch
from ptxsim.cutlass import CutlassGemm, include_dir
from ptxsim.model import A100_SXM_80GB, RTX_3090, estimate
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from benchmarks.support.measure import write_csv
from loradash_kernels.testing import Case, make_case
from tests.support import cuda_emulation as emulation

BF16, F32 = torch.bfloat16, torch.float32
RANK, DIRECTIONS, DROPOUT = 16, 8, 0.05
CARDS = {"sm_80": A100_SXM_80GB, "sm_86": RTX_3090}
SHAPES = [(m, k, n) for m in (4096, 8192) for k, n in ((4096, 4096), (4096, 11008), (11008, 4096))]


def outputs(case: Case, make: Callable[..., torch.Tensor]) -> dict[str, Any]:
    """Whatever the kernels of a case without bias write, by name."""
    t: dict[str, Any] = case.tensors
    (m, k), n = case.x.shape, case.dy.shape[1]
    rank, dash = (0 if t[name] is None else t[name].shape[0] for name in ("lora_a", "dash_sigma"))
    return {
        "y": make(m, n, dtype=BF16),
        "p": make(m, rank + dash),
        "x": make(m, k, dtype=BF16),
        "lora_a": make(rank, k) if rank else None,
        "lora_b": make(n, rank) if rank else None,
        "dash_sigma": make(dash) if dash else None,
        "bias": None,
    }


def launches(
    m: int,
    k: int,
    n: int,
    card: tuple[int, int],
    tile: str,
    passes: tuple[str, ...] = ("forward", "backward"),
    rank: int = RANK,
    dash: int = DIRECTIONS,
    dropout: float = DROPOUT,
    weight: bool = True,
) -> list[tuple[str, list[tuple], list[torch.Tensor]]]:
    """(pass, launches, buffers) for each pass of a case without bias."""
    case = make_case(m, k, n, rank, dash, BF16, adapter_dtype=F32, bias=False, dropout_p=dropout)
    seed = torch.tensor([1, 2]) if dropout else None
    out = outputs(case, torch.zeros)
    found = []
    for pass_ in passes:
        planned, kept = emulation.plan(case, out, pass_, seed, None, card, tile, weight)
        buffers = [t for t in (*out.values(), seed, case.dy, case.x, *kept) if t is not None]
        found.append((pass_, planned, buffers))
    return found


def planned_grids(m: int, k: int, n: int, card: tuple[int, int]) -> dict[str, tuple[int, ...]]:
    """The grid of every launch as planned for a card, by family. The tensors are reserved, never touched."""
    shapes = {
        "lora_a": (RANK, k),
        "lora_b": (n, RANK),
        "dash_u": (n, DIRECTIONS),
        "dash_vt": (DIRECTIONS, k),
        "dash_sigma": (DIRECTIONS,),
    }
    tensors: dict[str, torch.Tensor | None] = {name: torch.empty(shape) for name, shape in shapes.items()}
    tensors |= {"x": torch.empty(m, k, dtype=BF16), "weight": torch.empty(n, k, dtype=BF16), "bias": None}
    case = Case(tensors, torch.empty(m, n, dtype=BF16), scaling=2.0, dropout_p=DROPOUT, seed=0)
    out = outputs(case, torch.empty)
    plans = [emulation.plan(case, out, p, torch.tensor([1, 2]), None, card, "")[0] for p in ("forward", "backward")]
    return {name.split("_")[0]: tuple(grid) for planned in plans for name, grid, *_ in planned}


def main_loop_conflicts(stats: Any) -> int:
    """Bank conflicts of copies into shared memory and of ldmatrix."""
    return sum(stats.smem["by_op"].get(kind, {}).get("conflicts", 0) for kind in ("cp_async", "ldmatrix"))


def beside_cutlass(size: int = 512) -> list[dict[str, Any]]:
    """Our products over CUTLASS's, tile by tile, all of size x size x size."""
    rows: list[dict[str, Any]] = []
    for shape, stages in (((128, 128, 32), 3), ((128, 256, 32), 3)):
        name = f"{shape[0]}x{shape[1]}"
        kind = "cutlass::bfloat16_t"
        theirs = CutlassGemm(element=kind, output=kind, tile=shape, warp=(64, 64, 32), stages=stages)
        x, w = (torch.randn(size, size).to(BF16) for _ in range(2))
        c, d = (torch.zeros(size, size, dtype=BF16) for _ in range(2))
        counted = [("CUTLASS", theirs(size, size, size, x, w, c, d))]
        for pass_, planned, buffers in launches(size, size, size, emulation.CARDS["sm_80"], name, dropout=0.0):
            stats = emulation.emulate(planned, buffers, "sm_80")
            counted += [
                (f"ours, {pass_}", s) for (kernel, *_), s in zip(planned, stats, strict=True) if "gemm" in kernel
            ]
        base = counted[0][1].warp_insts / counted[0][1].insts["mma"]
        for who, s in counted:
            rows.append(
                {
                    "tile": name,
                    "kernel": who,
                    "tensor / plain": s.insts["mma"] / counted[0][1].insts["mma"],
                    "warp instructions / mma": s.warp_insts / s.insts["mma"],
                    "over CUTLASS": s.warp_insts / s.insts["mma"] / base,
                    "conflicts in the main loop": main_loop_conflicts(s),
                    "conflicts": s.smem["conflicts"],
                    "sectors / plain": (s.gld["sectors"] + s.gst["sectors"])
                    / (counted[0][1].gld["sectors"] + counted[0][1].gst["sectors"]),
                }
            )
    return rows


def passes(m: int = 2048, size: int = 1024) -> list[dict[str, Any]]:
    """Bytes that each pass requests and touches, over those of its one large operand."""
    rows = []
    for _, planned, buffers in launches(m, size, size, emulation.CARDS["sm_80"], ""):
        stats = emulation.emulate(planned, buffers, "sm_80")
        for (kernel, *_), s in zip(planned, stats, strict=True):
            if kernel.split("_")[0] in ("down", "dy", "x"):
                requested, touched = (
                    32 * (s.gld["sectors"] + s.gst["sectors"]),
                    s.unique_load_bytes + s.unique_store_bytes,
                )
                rows.append(
                    {
                        "kernel": kernel,
                        "requested / operand": requested / (2 * m * size),
                        "touched / operand": touched / (2 * m * size),
                        "conflicts in the main loop": main_loop_conflicts(s),
                    }
                )
    return rows


def before_a_library_product(m: int = 2048, size: int = 1024) -> list[dict[str, Any]]:
    """Low-rank terms alone, written as y and dx: what each tile requests and executes, and how many programs of it an A100's and
    an RTX 3090's processor holds. The last tile is what the plan takes."""
    rows = []
    used: dict[str, dict[str, int]] = {}
    for source in emulation.SOURCES:
        used |= ptxsim.resources(emulation.ptx(source, "sm_80"))
    for tile in ("128x256", "128x128", "64x128", "64x64", ""):
        for pass_, planned, buffers in launches(m, size, size, emulation.CARDS["sm_80"], tile, weight=False):
            stats = emulation.emulate(planned, buffers, "sm_80")
            for (kernel, _, threads, shared, _), s in zip(planned, stats, strict=True):
                if not kernel.startswith("gemm"):
                    continue
                registers = -(-used[kernel]["registers"] // 8) * 8
                by_registers = 65536 // (registers * threads)
                rows.append(
                    {
                        "pass": pass_,
                        "kernel": kernel,
                        "requested / output": 32 * (s.gld["sectors"] + s.gst["sectors"]) / (2 * m * size),
                        "touched / output": (s.unique_load_bytes + s.unique_store_bytes) / (2 * m * size),
                        "warp instructions / KB": s.warp_insts / (2 * m * size / 1024),
                        "conflicts": s.smem["conflicts"],
                        "registers": registers,
                        "programs, 164 KB": min(by_registers, 164 * 1024 // (shared + 1024)),
                        "programs, 100 KB": min(by_registers, 100 * 1024 // (shared + 1024)),
                    }
                )
    return rows


def line(one: Any, two: Any, steps: tuple[int, int], target: float, ctas: int, moved: float) -> Any:
    """Counters per program as a line through two measurements, continued to `target` steps and `ctas` programs.

    `moved` bytes are what DRAM sees.
    """

    def at(a: float, b: float) -> float:
        a, b = a / one.ctas, b / two.ctas
        return ctas * (a + (b - a) * (target - steps[0]) / (steps[1] - steps[0]))

    def each(a: dict, b: dict) -> dict:
        return {
            key: at(a.get(key, 0), b.get(key, 0))
            for key in {*a, *b}
            if isinstance(a.get(key, b.get(key)), (int, float))
        }

    found = copy.copy(one)
    found.insts, found.mma_types = collections.Counter(each(one.insts, two.insts)), each(one.mma_types, two.mma_types)
    found.gld, found.gst, found.smem = each(one.gld, two.gld), each(one.gst, two.gst), each(one.smem, two.smem)
    found.warp_insts, found.ctas = at(one.warp_insts, two.warp_insts), ctas
    found.unique_load_bytes, found.unique_store_bytes = moved, 0
    return found


class Model:
    """Bounds of single launches on one card, in us, from emulations that are made once."""

    def __init__(self, architecture: str) -> None:
        self.architecture, self.gpu = architecture, CARDS[architecture]
        self.card = emulation.CARDS[architecture]
        self._counted: dict[tuple, Any] = {}
        self._grids: dict[tuple, dict[str, tuple[int, ...]]] = {}

    def count(self, family: str, pass_: str, m: int, k: int, n: int, tile: str, rank: int) -> Any:
        key = (family, pass_, m, k, n, tile, rank)
        if key not in self._counted:
            # Four processors make programs as tall as they are on the card.
            few = (4, self.card[1])
            options = {} if rank else {"rank": 0, "dash": 0, "dropout": 0.0}
            ((_, planned, buffers),) = launches(m, k, n, few, tile, (pass_,), **options)
            stats = emulation.emulate(planned, buffers, self.architecture)
            self._counted[key] = next(
                s for (name, *_), s in zip(planned, stats, strict=True) if name.startswith(family)
            )
        return self._counted[key]

    def bound(self, stats: Any) -> float:
        return estimate(stats, self.gpu).time_us

    def product(self, pass_: str, m: int, k: int, n: int, tile: str, rank: int = RANK) -> float:
        rows, columns = (int(side) for side in tile.split("x"))
        depth, wide = (k, n) if pass_ == "forward" else (n, k)
        small = [
            self.count("gemm", pass_, rows, *((d, columns) if pass_ == "forward" else (columns, d)), tile, rank)
            for d in (512, 1024)
        ]
        ctas = math.ceil(m / rows) * math.ceil(wide / columns)
        moved = 2.0 * (m * depth + depth * wide + m * wide + (m + wide) * 32 * bool(rank))
        return self.bound(line(*small, (512, 1024), depth, ctas, moved))

    def best_product(self, pass_: str, m: int, k: int, n: int, rank: int = RANK) -> tuple[float, str]:
        tiles = [t for t in ("128x256", "128x128") if t in emulation.extension.compiled().cuda_tiles(self.card)]
        return min((self.product(pass_, m, k, n, tile, rank), tile) for tile in tiles)

    def grids(self, m: int, k: int, n: int) -> dict[str, tuple[int, ...]]:
        if (m, k, n) not in self._grids:
            self._grids[m, k, n] = planned_grids(m, k, n, self.card)
        return self._grids[m, k, n]

    def down(self, m: int, k: int, n: int) -> float:
        chunks, blocks, _ = self.grids(m, k, n)["down"]
        small = [self.count("down", "forward", 64, depth, 64, "", RANK) for depth in (256, 384)]
        # Partial sums are read again at once, by the last program to arrive: counted once.
        partial = 4.0 * m * (RANK + DIRECTIONS) * chunks if chunks > 1 else 0.0
        moved = 2.0 * m * k + 2 * 32 * k + 4 * m * (RANK + DIRECTIONS) + 2 * m * 32 + partial
        return self.bound(line(*small, (256, 384), k / chunks, chunks * blocks, moved))

    def dy(self, m: int, k: int, n: int) -> float:
        chunks, splits, _ = self.grids(m, k, n)["dy"]
        small = [self.count("dy", "backward", height, 64, 2048, "", RANK) for height in (128, 256)]
        partial = 4 * m * (RANK + DIRECTIONS) * chunks + 4 * splits * RANK * n
        moved = 2.0 * m * n + 2 * 32 * n + 2 * m * 24 + partial + 2 * m * 32
        return self.bound(line(*small, (128, 256), m / splits, chunks * splits, moved))

    def x(self, m: int, k: int, n: int) -> float:
        chunks, splits, _ = self.grids(m, k, n)["x"]
        small = [self.count("x", "backward", height, 512, 64, "", RANK) for height in (128, 256)]
        moved = 2.0 * m * k + 2 * m * 32 + 4 * splits * RANK * k
        return self.bound(line(*small, (128, 256), m / splits, chunks * splits, moved))

    def small(self, bytes_moved: float) -> float:
        return bytes_moved / (self.gpu.dram_gbs * 1e3)

    def pack(self, m: int, k: int, n: int, backward: bool) -> float:
        return self.small((4 * (RANK + DIRECTIONS) + 2 * 32) * (k + n) + (backward and (4 * 24 + 2 * 24) * m))

    def finish(self, m: int, k: int, n: int) -> float:
        splits = [self.grids(m, k, n)[family][1] for family in ("x", "dy")]
        return self.small(4 * RANK * (k * (splits[0] + 1) + n * (splits[1] + 1)))

    def row(self, m: int, k: int, n: int) -> dict[str, Any]:
        plain_forward, tile = self.best_product("forward", m, k, n, rank=0)
        plain_backward, _ = self.best_product("backward", m, k, n, rank=0)
        down, pack, packed = self.down(m, k, n), self.pack(m, k, n, False), self.pack(m, k, n, True)
        product, _ = self.best_product("forward", m, k, n)
        dx, _ = self.best_product("backward", m, k, n)
        dy, x, finish = self.dy(m, k, n), self.x(m, k, n), self.finish(m, k, n)
        return {
            "card": self.gpu.name,
            "M": m,
            "K": k,
            "N": n,
            "plain tile": tile,
            "plain forward, us": plain_forward,
            "forward, two launches": (pack + down + product) / plain_forward,
            "forward, one launch": (pack + self.one_launch(m, k, n))
            / min(plain_forward, self.product("forward", m, k, n, "128x128", 0)),
            "backward, apart": (packed + dy + dx + x + finish) / plain_backward,
            "backward, dx with dy": self.one_launch_backward(m, k, n)
            / min(plain_backward, self.product("backward", m, k, n, "128x128", 0)),
            "of which down": down / plain_forward,
            "dy pass": dy / plain_backward,
            "x pass": x / plain_backward,
            "dx": dx / plain_backward,
            "small ones": (packed + finish) / plain_backward,
        }

    def together(self, product: Any, over: Any) -> float:
        """The bound of a product and a pass in one launch: resources add up, then the busiest counts."""
        for name in ("insts", "mma_types", "gld", "gst", "smem"):
            mine, theirs = getattr(product, name), getattr(over, name)
            setattr(product, name, {key: mine.get(key, 0) + theirs.get(key, 0) for key in {*mine, *theirs}})
        product.warp_insts += over.warp_insts
        return self.bound(product)

    def one_launch(self, m: int, k: int, n: int) -> float:
        gemm = [self.count("gemm", "forward", 128, depth, 128, "128x128", RANK) for depth in (512, 1024)]
        down = [self.count("down", "forward", 64, depth, 64, "", RANK) for depth in (256, 384)]
        ctas = math.ceil(m / 128) * math.ceil(n / 128)
        moved = 2.0 * (m * k + k * n + m * n + (m + n) * 32) + 2 * 32 * k + 4 * m * 24
        return self.together(
            line(*gemm, (512, 1024), k, ctas, moved), line(*down, (256, 384), k, math.ceil(m / 64), 0.0)
        )

    def one_launch_backward(self, m: int, k: int, n: int) -> float:
        """dx with the pass over dy, the other launches beside it."""
        gemm = [self.count("gemm", "backward", 128, 128, depth, "128x128", RANK) for depth in (512, 1024)]
        dy = [self.count("dy", "backward", height, 64, 2048, "", RANK) for height in (128, 256)]
        blocks, chunks = math.ceil(m / 128), math.ceil(n / 256)
        partial = 4 * m * (RANK + DIRECTIONS) * chunks + 4 * blocks * RANK * n
        moved = 2.0 * (m * n + n * k + m * k + (m + k) * 32) + 2 * 32 * n + 2 * m * 24 + partial
        product = line(*gemm, (512, 1024), n, blocks * math.ceil(k / 128), moved)
        launch = self.together(product, line(*dy, (128, 256), 128, blocks * math.ceil(n / 512), 0.0))
        x_splits = self.grids(m, k, n)["x"][1]
        finish = self.small(4 * RANK * (k * (x_splits + 1) + n * (blocks + 1)))
        return self.pack(m, k, n, True) + launch + self.x(m, k, n) + finish


def show(console: Console, title: str, rows: list[dict[str, Any]]) -> None:
    table = Table(*rows[0], title=title)
    for row in rows:
        table.add_row(*(f"{v:.3f}" if isinstance(v, float) else str(v) for v in row.values()))
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    reason = emulation.missing_tools()
    if reason:
        raise SystemExit(f"nothing can be emulated here: {reason}")
    console = Console(width=170)
    tables = {"cuda_passes": ("counted: the passes, M 2048, K = N = 1024, r 16, s 8, dropout 0.05", passes())}
    apart = before_a_library_product()
    tables["cuda_before_library"] = ("counted: products of a call without W, M 2048, K = N = 1024, dropout 0.05", apart)
    if include_dir() is None:
        console.print(
            "CUTLASS's headers are not installed (pip install --no-deps nvidia-cutlass==4.2.0.0): no comparison"
        )
    else:
        tables["cuda_beside_cutlass"] = ("counted: 512 x 512 x 512, bf16, r 16, s 8", beside_cutlass())
    models = [Model(architecture) for architecture in CARDS]
    bounds = [model.row(*shape) for model in models for shape in tqdm(SHAPES, desc=model.gpu.name, file=sys.stderr)]
    tables["cuda_modelled"] = ("MODELLED bounds over that of the frozen product; r 16, s 8, dropout 0.05", bounds)
    for name, (title, rows) in tables.items():
        show(console, title, rows)
        if options.out:
            write_csv(options.out / f"{name}.csv", rows)


if __name__ == "__main__":
    main()
