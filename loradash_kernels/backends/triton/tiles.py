"""Tile tables of the Triton kernels per architecture, and the pure function that picks from them.

Tests compile the tiles for their targets and hold them to the target's shared memory and registers without spills. The
order within a table is by size: the first tile that still fills the processors is taken.
"""

from __future__ import annotations

import re
from dataclasses import replace

from .target import Target, TileConfig

MAX_WIDTH = 256
"""The largest r + s that the kernels take."""

ONE_LAUNCH_WIDTH = 32
"""The largest r + s, rounded up, of the one-launch forward: its accumulator of P stands beside that of the tile."""

KB = 1024
TARGETS = {
    t.name: t
    for t in (
        Target("sm_80", 163 * KB, 108),
        Target("sm_86", 99 * KB, 82),
        # Jetson Orin.
        Target("sm_87", 163 * KB, 16),
        Target("sm_89", 99 * KB, 128),
        Target("sm_90", 227 * KB, 132, matrix_instruction="HGMMA"),
        Target("sm_100", 227 * KB, 148, matrix_instruction="UTCHMMA"),
        Target("sm_103", 227 * KB, 148, matrix_instruction="UTCHMMA", triton=(3, 6)),
        # Jetson Thor.
        Target("sm_110", 227 * KB, 20, matrix_instruction="UTCHMMA", triton=(3, 7)),
        Target("sm_120", 99 * KB, 170),
        Target("sm_121", 99 * KB, 48, triton=(3, 6)),
        Target("gfx90a", 64 * KB, 104, warp_size=64, matrix_instruction="v_mfma", tf32=False),
        Target("gfx942", 64 * KB, 304, warp_size=64, matrix_instruction="v_mfma"),
    )
}

# LLVM in Triton 3.3 to 3.8 ends the process, or its assembler refuses.
NO_TRITON = ("sm_88",)


def _generation(architecture: str) -> tuple[str, int] | None:
    """Family and number within it: cards of one family run what was made for its smaller numbers. None: no such family."""
    nvidia, cdna = re.fullmatch(r"sm_(\d+)", architecture), re.fullmatch(r"gfx9([0-9a-f]{2})", architecture)
    if nvidia:
        return "sm", int(nvidia[1])
    return ("gfx9", int(cdna[1], 16)) if cdna else None


def nearest(architecture: str, shared_limit: int | None) -> Target | None:
    """The newest listed target that is older than an unlisted card and no greedier than its shared memory; None without one.

    shared_limit: bytes that a block may take; None where unknown: as little as any card of the family has.
    """
    wanted = None if architecture in NO_TRITON else _generation(architecture)
    family = {g: t for t in TARGETS.values() if wanted and (g := _generation(t.name)) and g[0] == wanted[0]}
    if shared_limit is None:
        shared_limit = min((t.shared_limit for t in family.values()), default=0)
    fitting = [g for g, t in family.items() if wanted and g < wanted and t.shared_limit <= shared_limit]
    return family[max(fitting)] if fitting else None


# block_m, block_n, block_k, num_warps, num_stages. block_k 32 keeps R = 24 at 32 rank columns; Hopper's instructions
# and descriptors want rows of 128 bytes.
_AMPERE = (
    TileConfig(128, 128, 32, 4, 3, tight=True),
    TileConfig(128, 128, 32, 8, 3, tight=True),
    TileConfig(64, 128, 32, 4, 3),
    TileConfig(64, 64, 32, 4, 4),
)
_HOPPER = (
    TileConfig(128, 256, 64, 8, 3, tight=True),
    TileConfig(128, 128, 64, 8, 4, tight=True),
    TileConfig(128, 128, 32, 8, 4),
    TileConfig(64, 128, 64, 4, 4),
    TileConfig(64, 64, 64, 4, 4),
)
_CDNA = (TileConfig(128, 128, 32, 4, 2), TileConfig(64, 128, 32, 4, 2), TileConfig(64, 64, 32, 4, 2))

GEMM: dict[str, tuple[TileConfig, ...]] = {
    **dict.fromkeys(("sm_80", "sm_87"), (TileConfig(128, 256, 32, 8, 4, tight=True), *_AMPERE)),
    **dict.fromkeys(("sm_86", "sm_89", "sm_120", "sm_121"), _AMPERE),
    "sm_90": _HOPPER,
    **dict.fromkeys(("sm_100", "sm_103", "sm_110"), _HOPPER[1:]),
    **dict.fromkeys(("gfx90a", "gfx942"), _CDNA),
}
# Without tensor cores for full fp32 products: accumulators and both operands live in registers.
GEMM_FP32 = (TileConfig(64, 64, 16, 4, 3, tight=True), TileConfig(32, 64, 16, 4, 3))
# For consumer Blackwell the assembler wants more registers than four warps have.
_GEMM_FP32_BLACKWELL = (TileConfig(64, 64, 16, 8, 3, tight=True), GEMM_FP32[1])

# The one-launch forward holds the accumulator of P beside the tile's, and draws the mask inside its K loop. Not on AMD,
# where a barrier does not wait for other waves' stores: T would be released before it is written.
# These stay within 99 KB of shared memory.
_ONE_LAUNCH_SMALL = (TileConfig(128, 64, 32, 8, 3), TileConfig(64, 64, 32, 4, 3))
_ONE_LAUNCH_HOPPER = (TileConfig(128, 128, 32, 8, 4, tight=True), TileConfig(64, 64, 32, 4, 4))
ONE_LAUNCH = {
    **dict.fromkeys(("sm_80", "sm_87"), (TileConfig(128, 64, 32, 8, 4), TileConfig(64, 64, 32, 4, 4))),
    **dict.fromkeys(("sm_86", "sm_89", "sm_120", "sm_121"), _ONE_LAUNCH_SMALL),
    **dict.fromkeys(("sm_90", "sm_100", "sm_103", "sm_110"), _ONE_LAUNCH_HOPPER),
}
ONE_LAUNCH_FP32 = (TileConfig(32, 32, 16, 4, 2),)

# The passes over one large operand. down: rows x block_k of x; dy: rows x block_n of dy; x: rows x block_k of x.
# Wide rank blocks take registers and shared memory: narrower tiles from 64 on.
_DOWN = (TileConfig(64, 0, 64, 8, 3), TileConfig(32, 0, 128, 4, 3), TileConfig(16, 0, 128, 4, 3))
# Partial sums of G take 4 R / (2 block_n) of the bytes of dy.
_DY = TileConfig(32, 256, 0, 8, 3)
_DY_CDNA = TileConfig(32, 128, 0, 4, 3)
_X = TileConfig(64, 0, 128, 8, 3)


def _fills(config: TileConfig, rows: int, columns: int, target: Target) -> bool:
    return -(-rows // config.block_m) * -(-columns // config.block_n) >= target.processors


def gemm_table(target: Target, itemsize: int, depth: int = 0, rank_block: int = 16) -> tuple[TileConfig, ...]:
    """The tiles that a product of this depth (K forward, N backward) and rank may take, largest first."""
    table = GEMM[target.name]
    if itemsize == 4:
        table = _GEMM_FP32_BLACKWELL if target.name in ("sm_120", "sm_121") else GEMM_FP32
    return tuple(c for c in table if not c.tight or (depth % c.block_k == 0 and rank_block <= 64))


def pick_gemm(
    target: Target, itemsize: int, rows: int, columns: int, depth: int = 0, rank_block: int = 16
) -> TileConfig:
    """The tile of the forward product (rows M, columns N, depth K) or of dx (rows M, columns K, depth N)."""
    table = gemm_table(target, itemsize, depth, rank_block)
    return next((c for c in table if _fills(c, rows, columns, target)), table[-1])


def one_launch_table(target: Target, itemsize: int) -> tuple[TileConfig, ...]:
    """Every tile of the one-launch forward, largest first."""
    return ONE_LAUNCH_FP32 if itemsize == 4 else ONE_LAUNCH.get(target.name, ())


def pick_one_launch(target: Target, itemsize: int, rows: int, columns: int) -> TileConfig:
    """The tile of the one-launch forward."""
    table = one_launch_table(target, itemsize)
    return next((c for c in table if _fills(c, rows, columns, target)), table[-1])


def pick_down(target: Target, itemsize: int, rows: int, rank_block: int) -> TileConfig:
    """The tile of the down-projection: block_m rows of x, block_k columns at a time.

    D is read once per block of rows, from L2: 16 rows of 16-bit x are outweighed three times by an fp32 D of R = 24, so
    low blocks are for those M that would leave most processors idle.
    """
    high, middle, low = _DOWN
    config = high if rows >= high.block_m * target.processors else middle
    if 2 * rows < middle.block_m * target.processors:
        config = low
    return _narrowed(config, target, itemsize, rank_block)


def pick_dy(target: Target, itemsize: int, rank_block: int) -> TileConfig:
    """The tile of the pass over dy: block_m rows at a time, block_n columns."""
    config = _narrowed(_DY if target.warp_size == 32 else _DY_CDNA, target, itemsize, rank_block)
    # Triton 3.8 gives the tile of dy a buffer too few where dB is an asynchronous product with an operand in registers,
    # which it becomes at 64 ranks: a copy overwrites what the product still reads.
    return replace(config, num_stages=1) if target.asynchronous and itemsize == 2 and rank_block >= 64 else config


def pick_x(target: Target, itemsize: int, rank_block: int) -> TileConfig:
    """The tile of the pass over x: block_m rows at a time, block_k columns."""
    config = _narrowed(_X, target, itemsize, rank_block)
    return replace(config, num_stages=3) if itemsize == 2 else config


def _narrowed(config: TileConfig, target: Target, itemsize: int, rank_block: int) -> TileConfig:
    """Wider rank blocks and fp32 leave less room: fewer columns and stages, more warps, and fewer rows for both."""
    shrink = (2 if rank_block >= 64 else 1) * (2 if rank_block >= 256 else 1) * (4 if itemsize == 4 else 1)
    few_rows = rank_block >= 128 and (itemsize == 4 or target.warp_size == 64)
    return TileConfig(
        16 if few_rows else config.block_m,
        max(16, config.block_n // shrink) if config.block_n else 0,
        max(16, config.block_k // shrink) if config.block_k else 0,
        8 if rank_block >= 128 else config.num_warps,
        config.num_stages if shrink == 1 else 2,
    )
