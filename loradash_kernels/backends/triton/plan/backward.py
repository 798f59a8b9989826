"""The launches of a backward call: one pass over dy, the sum of its parts, dx, one pass over x, and the last sums."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ....calls import BackwardCall, accumulator
from .. import tiles
from ..kernels import backward as bwd
from ..kernels import descriptor as desc
from ..problem import (
    KernelLaunch,
    LibraryProduct,
    Plan,
    Problem,
    Zeros,
    descriptor,
    round_up,
    strides,
    tile_count,
    wide,
)
from ..strategies import DEFAULT, Strategy, descriptors_fit
from ..target import TileConfig

PAD = 256
"""Rows and columns of packed operands come in multiples of this: no tile of any table is higher or wider."""

_FINISH_BLOCK = 1024
_SUM_ROWS = 16
# Ranks that dx takes at a time: more would not fit beside the accumulator.
_RANK_STEP = 32
# Bytes that the partial sums of G may take, where they are more than those of two tiles of columns.
_G_BYTES = 128 << 20
# Rows of a split of M: with fewer, partial sums outweigh what they are sums of.
_MIN_ROWS = 256


def plan_backward(problem: Problem[BackwardCall], strategy: Strategy | None = None) -> Plan:
    """The wanted ones of dx (M, K), dA (r, K), dB (N, r), d(sigma) (s,), db (N,)."""
    call, m, n = problem.call, problem.m, problem.n
    if m == 0 or n == 0:
        wanted = (call.dx, call.da, call.db_lora, call.dsigma, call.dbias)
        return [Zeros(grad) for grad in wanted if grad is not None]
    da, db_lora, dsigma, dx = (_not_empty(grad) for grad in (call.da, call.db_lora, call.dsigma, call.dx))
    dbias = call.dbias
    needs_g = problem.width > 0 and any(grad is not None for grad in (dx, da, dsigma))
    f32 = accumulator(problem.x.dtype)
    launches: Plan = []

    tile = tiles.pick_dy(problem.target, problem.itemsize, problem.r_block)
    columns = columns_at_a_time(problem, tile.block_n) if needs_g else tile_count(n, tile.block_n)
    splits, rows = splits_of_m(problem, columns * tile.block_n, tile.block_n, tile.block_m)
    # Where dy is taken in several rounds, the sum of the rounds before has a part of its own.
    rounds = tile_count(tile_count(n, tile.block_n), columns)
    g_part = problem.empty(columns + (rounds > 1), m, problem.width, dtype=f32) if needs_g else None
    db_part = problem.empty(splits, problem.rank, n, dtype=f32) if db_lora is not None else None
    dbias_part = problem.empty(splits, n, dtype=f32) if dbias is not None else None
    if needs_g or db_part is not None or dbias_part is not None:
        launches += _dy_passes(problem, tile, columns, (splits, rows), g_part, db_part, dbias_part)

    t = d = dsigma_part = None
    m_padded, k_padded = round_up(m, PAD), round_up(problem.k, PAD)
    sum_tiles = m_padded // _SUM_ROWS
    if g_part is not None:
        t, d = problem.empty(problem.r_block, m_padded), problem.empty(problem.r_block, k_padded)
        dsigma_part = problem.empty(sum_tiles, problem.r_block, dtype=f32) if dsigma is not None else None
        launches.append(_sum_g(problem, sum_tiles, g_part, t, d, dsigma_part))
    if dx is not None:
        launches += _dx(problem, t, d, dx, strategy or DEFAULT)
    da_part, x_splits = None, 0
    if da is not None and t is not None:
        tile = tiles.pick_x(problem.target, problem.itemsize, problem.rank_block)
        x_splits, rows = splits_of_m(problem, problem.k, tile.block_k, tile.block_m)
        da_part = problem.empty(x_splits, problem.rank, problem.k, dtype=f32)
        launches.append(_x_pass(problem, tile, x_splits, rows, t, da_part))
    partial, grads = (da_part, db_part, dbias_part, dsigma_part), (da, db_lora, dbias, dsigma)
    launches += _finish(problem, (x_splits, splits, sum_tiles), partial, grads)
    return launches


def _not_empty(grad: Tensor | None) -> Tensor | None:
    return grad if grad is not None and grad.numel() else None


def columns_at_a_time(problem: Problem[BackwardCall], block: int) -> int:
    """How many tiles of `block` columns `dy_pass` takes at a time: all of them, or as many as _G_BYTES allow, in even rounds."""
    count, most = tile_count(problem.n, block), _G_BYTES // (4 * problem.m * problem.width)
    # One more part is for the sum of the rounds before.
    return count if count <= most else tile_count(count, tile_count(count, max(1, most - 1)))


def splits_of_m(problem: Problem[BackwardCall], columns: int, block: int, block_m: int) -> tuple[int, int]:
    """How many parts M is summed in and the rows of each: twice the processors' programs, at least _MIN_ROWS rows."""
    wanted = max(1, 2 * problem.target.processors // tile_count(columns, block))
    rows = round_up(max(_MIN_ROWS, tile_count(problem.m, wanted)), block_m)
    return tile_count(problem.m, rows), rows


def _dy_passes(
    problem: Problem[BackwardCall],
    tile: TileConfig,
    columns: int,
    split: tuple[int, int],
    g_part: Tensor | None,
    db_part: Tensor | None,
    dbias_part: Tensor | None,
) -> list[KernelLaunch]:
    """dy in rounds of `columns` tiles of it; split: how many parts M is summed in, and the rows of each."""
    dy, n, (splits, rows) = problem.call.dy, problem.n, split
    adapters = problem.adapter_args("bu")
    launches: list[KernelLaunch] = []
    # The last round fills every part, so that `sum_g` finds parts without a gap: the first may be the short one.
    count = tile_count(n, tile.block_n)
    first_tile, taken = 0, count - (tile_count(count, columns) - 1) * columns
    while first_tile < count:
        launches.append(
            KernelLaunch(
                bwd.dy_pass,
                (taken, splits),
                {
                    "dy": dy, **adapters, "p": problem.call.p, "g_part": g_part, "db_part": db_part,
                    "dbias_part": dbias_part, "M": problem.m, "N": n, "first_tile": first_tile,
                    **strides(dy, "ym yn"), "rows_per_split": rows,
                },
                {
                    **problem.rank_constants, "RANK_BLOCK": problem.rank_block, "BLOCK_M": tile.block_m,
                    "BLOCK_N": tile.block_n, "EVEN_N": n % tile.block_n == 0, "WIDE": wide(dy, *adapters.values()),
                    "PRECISION": problem.precision,
                },
                tile.num_warps,
                problem.stages(tile),
            )
        )  # fmt: skip
        first_tile += taken
        if first_tile < count and g_part is not None:
            launches.append(_add_parts(g_part, taken, first=len(launches) == 1))
        taken = columns
    return launches


def _add_parts(g_part: Tensor, taken: int, first: bool) -> KernelLaunch:
    size = g_part[0].numel()
    return KernelLaunch(
        bwd.add_parts,
        (tile_count(size, _FINISH_BLOCK),),
        {"g_part": g_part, "size": size, "parts": taken, "last": g_part.shape[0] - 1},
        {"FIRST": first, "BLOCK": _FINISH_BLOCK},
    )


def _sum_g(
    problem: Problem[BackwardCall], tiles_m: int, g_part: Tensor, t: Tensor, d: Tensor, dsigma_part: Tensor | None
) -> KernelLaunch:
    adapters = problem.adapter_args("av")
    pack_k = min(PAD, 8192 // problem.r_block)
    return KernelLaunch(
        bwd.sum_g,
        (tiles_m + d.shape[1] // pack_k,),
        {
            "g_part": g_part, "p": problem.call.p, "dash_sigma": problem.dash_sigma, **adapters, "t": t, "d": d,
            "dsigma_part": dsigma_part, "M": problem.m, "K": problem.k, "m_padded": t.shape[1], "k_padded": d.shape[1],
            "parts": g_part.shape[0], "tiles_m": tiles_m, "scaling": problem.scaling,
        },
        {**problem.rank_constants, "BLOCK_M": _SUM_ROWS, "PACK_K": pack_k, "WIDE": wide(*adapters.values())},
        8 if problem.r_block >= 128 else 4,
    )  # fmt: skip


def _dx(problem: Problem[BackwardCall], t: Tensor | None, d: Tensor | None, dx: Tensor, strategy: Strategy) -> Plan:
    dy, weight, target = problem.call.dy, problem.weight, problem.target
    product = None
    if strategy.kind == "library" and weight is not None:
        # The masked low-rank term is written first: the library adds what is there in its own epilogue.
        product = LibraryProduct(dy, weight, None, dx, transposed=False, accumulate=t is not None)
        if t is None:
            return [product]
        weight = None
    # Where only rank columns are summed there is no room for the tightest tiles.
    depth = 1 if weight is None else problem.n
    tile = strategy.tile or tiles.pick_gemm(target, problem.itemsize, problem.m, problem.k, depth, problem.r_block)
    if weight is not None and strategy.kind == "descriptors" and descriptors_fit(problem, dy, weight):
        return [_descriptor_dx(problem, tile, weight, t, d, dx)]
    launch = _dx_gemm(problem, tile, weight, t, d, dx)
    return [launch, product] if product else [launch]


def _dx_gemm(
    problem: Problem[BackwardCall],
    tile: TileConfig,
    weight: Tensor | None,
    t: Tensor | None,
    d: Tensor | None,
    dx: Tensor,
) -> KernelLaunch:
    """Without a weight there is no loop over N, but the rank terms alone."""
    dy = problem.call.dy
    w, n = (problem.x, 0) if weight is None else (weight, problem.n)
    return KernelLaunch(
        bwd.dx_gemm,
        (tile_count(problem.m, tile.block_m) * tile_count(problem.k, tile.block_n),),
        {
            "dy": dy, "w": w, "N": n, **_dx_args(problem, t, d, dx), **strides(dy, "ym yn"),
            **strides(w, "wn wk"),
        },
        {
            **_dx_constants(problem, tile), "EVEN_N": n % tile.block_k == 0, "WIDE": wide(dy, w),
            "PRECISION": problem.precision,
        },
        tile.num_warps,
        problem.stages(tile),
    )  # fmt: skip


def _descriptor_dx(
    problem: Problem[BackwardCall],
    tile: TileConfig,
    weight: Tensor,
    t: Tensor | None,
    d: Tensor | None,
    dx: Tensor,
) -> KernelLaunch:
    count = tile_count(problem.m, tile.block_m) * tile_count(problem.k, tile.block_n)
    return KernelLaunch(
        desc.descriptor_dx,
        (min(count, problem.target.processors),),
        {
            "dy": descriptor(problem.call.dy, tile.block_m, tile.block_k),
            "w": descriptor(weight, tile.block_k, tile.block_n), "N": problem.n, **_dx_args(problem, t, d, dx),
        },
        _dx_constants(problem, tile),
        tile.num_warps,
        tile.num_stages,
    )  # fmt: skip


def _dx_args(problem: Problem[BackwardCall], t: Tensor | None, d: Tensor | None, dx: Tensor) -> dict[str, object]:
    return {
        "t": t, "d": d, "seed": problem.seed, "dx": dx, "M": problem.m, "K": problem.k,
        "m_padded": 0 if t is None else t.shape[1], "k_padded": 0 if d is None else d.shape[1],
        "keep_scale": problem.keep_scale, "threshold": problem.threshold,
    }  # fmt: skip


def _dx_constants(problem: Problem[BackwardCall], tile: TileConfig) -> dict[str, object]:
    step = min(problem.r_block, _RANK_STEP)
    return {"R_BLOCK": problem.r_block, "RANK_STEP": step, **tile.constants(), "DROPOUT": problem.dropout}


def _x_pass(
    problem: Problem[BackwardCall], tile: TileConfig, splits: int, rows: int, t: Tensor, da_part: Tensor
) -> KernelLaunch:
    x, k = problem.x, problem.k
    return KernelLaunch(
        bwd.x_pass,
        (tile_count(k, tile.block_k), splits),
        {
            "x": x, "t": t, "seed": problem.seed, "da_part": da_part, "M": problem.m, "K": k, "m_padded": t.shape[-1],
            **strides(x, "xm xk"), "threshold": problem.threshold, "rows_per_split": rows,
        },
        {
            "RANK": problem.rank, "R_BLOCK": problem.r_block, "RANK_BLOCK": problem.rank_block,
            "BLOCK_M": tile.block_m, "BLOCK_K": tile.block_k, "DROPOUT": problem.dropout,
            "EVEN_K": k % tile.block_k == 0, "WIDE": wide(x), "PRECISION": problem.precision,
        },
        tile.num_warps,
        problem.stages(tile),
    )  # fmt: skip


def _finish(
    problem: Problem[BackwardCall],
    counts: tuple[int, int, int],
    parts: Sequence[Tensor | None],
    grads: Sequence[Tensor | None],
) -> list[KernelLaunch]:
    """Sums the parts of dA, dB, db and d(sigma). counts: parts of M in the pass over x, over dy, and in the sum of G."""
    da_part, db_part, dbias_part, dsigma_part = parts
    da, db_lora, dbias, dsigma = grads
    x_splits, y_splits, sum_tiles = counts
    blocks = [0 if grad is None else tile_count(grad.numel(), _FINISH_BLOCK) for grad in (da, db_lora, dbias)]
    grid = sum(blocks) + (dsigma is not None)
    if grid == 0:
        return []
    return [
        KernelLaunch(
            bwd.finish,
            (grid,),
            {
                "da_part": da_part, "db_part": db_part, "dbias_part": dbias_part, "dsigma_part": dsigma_part, "da": da,
                "db_lora": db_lora, "dbias": dbias, "dsigma": dsigma, "K": problem.k, "N": problem.n,
                "x_splits": x_splits, "y_splits": y_splits, "sum_tiles": sum_tiles, "a_tiles": blocks[0],
                "b_tiles": blocks[1], "bias_tiles": blocks[2], "scale_a": problem.keep_scale,
                "scale_b": problem.scaling,
            },
            {**problem.rank_constants, "BLOCK": _FINISH_BLOCK},
        )
    ]  # fmt: skip
