"""From tensors to launches: which kernels a call runs, with which arguments, tiles and workspace.

A plan is data: `run` executes it on a GPU (or in Triton's interpreter); the tests also compile every launch of it for
each architecture and execute the result in an emulator.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...calls import accumulator
from . import tiles
from .kernels import backward as bwd
from .kernels import descriptor as desc
from .kernels import forward as fwd
from .problem import (
    Launch,
    LibraryProduct,
    Problem,
    Strategy,
    descriptor,
    descriptors_fit,
    power_of_two,
    round_up,
    tile_count,
    wide,
)
from .target import TileConfig

_PACK_N = 64
_FINISH_BLOCK = 1024
_SUM_ROWS = 16
_RANK_STEP = 32  # ranks that dx takes at a time: more would not fit beside the accumulator
_PAD = 256  # no tile of any table is higher or wider
_MIN_ROWS = 256  # of a split of M: below, partial sums outweigh what they are sums of


def plan_forward(
    q: Problem, bias: Tensor | None, base: Tensor | None, y: Tensor, p: Tensor, strategy: Strategy | None = None
) -> list[Launch | LibraryProduct]:
    """y (M, N) and P (M, R). `base` (M, N) replaces the base product where there is no weight."""
    if q.m == 0:
        return []
    strategy = strategy or Strategy()
    if bias is not None:
        bias = bias.contiguous()
    if strategy.kind == "one_launch" and q.weight is not None and q.width and q.n:
        return [_one_launch(q, strategy.tile or tiles.pick_one_launch(q.target, q.itemsize, q.m, q.n), bias, y, p)]
    library = strategy.kind == "library" and q.weight is not None
    depth = 1 if library else q.k  # rank columns alone, on top of a tile of y: no room for the tightest tiles
    tile = strategy.tile or tiles.pick_gemm(q.target, q.itemsize, q.m, q.n, depth, q.r_block)
    by_descriptors = strategy.kind == "descriptors" and descriptors_fit(q, q.x, q.weight)
    r_step = min(tile.block_k, q.r_block) if by_descriptors else tile.block_k
    r_width = round_up(q.width, r_step)
    t, packed = (q.empty(q.m, r_width), _packed_q(q, r_width)) if q.width else (q.x, q.x)
    launches: list[Launch | LibraryProduct] = [_down(q, r_width, p, t, packed)] if q.width else []
    weight, k = q.weight, q.k
    if library and weight is not None:
        launches.append(LibraryProduct(q.x, weight, bias, y, True))
        if not q.width:
            return launches
        weight, bias, base = None, None, y
    if weight is None:
        weight, k = packed, 0
    if by_descriptors:
        launches.append(_descriptor_forward(q, tile, r_step, r_width, t, packed, bias, y))
    elif y.numel():
        launches.append(_extended_gemm(q, tile, weight, k, r_width, t, packed, bias, base, y))
    return launches


def _packed_q(q: Problem, r_width: int) -> Tensor:
    """Room for Q (N, r_width), in the order of W: a tile that is read along N reads both along N."""
    if q.weight is not None and q.weight.stride(0) == 1 and q.weight.stride(1) != 1:
        return q.empty(r_width, q.n).t()
    return q.empty(q.n, r_width)


def _down(q: Problem, r_width: int, p: Tensor, t: Tensor, packed: Tensor) -> Launch:
    tile = tiles.pick_down(q.target, q.itemsize, q.m, q.r_block)
    tiles_m = tile_count(q.m, tile.block_m)
    adapters = q.adapter_args("abuv")
    return Launch(
        fwd.down_projection,
        (tiles_m + tile_count(q.n, _PACK_N),),
        {
            "x": q.x, **adapters, "dash_sigma": q.sigma(), "seed": q.seed if q.dropout else None, "p": p, "t": t,
            "q": packed, "M": q.m, "K": q.k, "N": q.n, "stride_xm": q.x.stride(0), "stride_xk": q.x.stride(1),
            "stride_qn": packed.stride(0), "stride_qr": packed.stride(1), "scaling": q.scaling,
            "keep_scale": q.keep_scale, "threshold": q.threshold, "tiles_m": tiles_m,
        },
        {
            "RANK": q.rank, "DIRECTIONS": q.directions, "R_BLOCK": q.r_block, "R_WIDTH": r_width,
            "R_STORE": power_of_two(r_width), "BLOCK_M": tile.block_m, "BLOCK_K": tile.block_k, "PACK_N": _PACK_N,
            "DROPOUT": q.dropout, "EVEN_K": q.k % tile.block_k == 0, "WIDE": wide(q.x, *adapters.values()),
            "PRECISION": q.precision,
        },
        tile.num_warps,
        tile.num_stages,
    )  # fmt: skip


def _extended_gemm(
    q: Problem, tile: TileConfig, weight: Tensor, k: int, r_width: int, t: Tensor, packed: Tensor, bias: Tensor | None,
    base: Tensor | None, y: Tensor,
) -> Launch:  # fmt: skip
    strides = base.stride() if base is not None else (0, 0)
    return Launch(
        fwd.extended_gemm,
        (tile_count(q.m, tile.block_m) * tile_count(q.n, tile.block_n),),
        {
            "x": q.x, "w": weight, "t": t, "q": packed, "bias": bias, "base": base, "y": y, "M": q.m, "N": q.n, "K": k,
            "stride_xm": q.x.stride(0), "stride_xk": q.x.stride(1), "stride_wn": weight.stride(0),
            "stride_wk": weight.stride(1), "stride_qn": packed.stride(0), "stride_qr": packed.stride(1),
            "stride_bm": strides[0], "stride_bn": strides[1],
        },
        {
            "R_WIDTH": r_width, "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k,
            "GROUP_M": tile.group_m, "EVEN_K": k % tile.block_k == 0, "WIDE": wide(q.x, weight),
            "PRECISION": q.precision,
        },
        tile.num_warps,
        tile.num_stages,
    )  # fmt: skip


def _descriptor_forward(
    q: Problem, tile: TileConfig, r_step: int, r_width: int, t: Tensor, packed: Tensor, bias: Tensor | None, y: Tensor
) -> Launch:
    assert q.weight is not None
    count = tile_count(q.m, tile.block_m) * tile_count(q.n, tile.block_n)
    return Launch(
        desc.descriptor_forward,
        (min(count, q.target.processors),),
        {
            "x": descriptor(q.x, tile.block_m, tile.block_k), "w": descriptor(q.weight, tile.block_n, tile.block_k),
            "t": descriptor(t, tile.block_m, r_step) if r_width else None,
            "q": descriptor(packed, tile.block_n, r_step) if r_width else None, "bias": bias, "y": y, "M": q.m,
            "N": q.n, "K": q.k,
        },
        {
            "R_WIDTH": r_width, "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k,
            "R_STEP": r_step, "GROUP_M": tile.group_m,
        },
        tile.num_warps,
        tile.num_stages,
    )  # fmt: skip


def _one_launch(q: Problem, tile: TileConfig, bias: Tensor | None, y: Tensor, p: Tensor) -> Launch:
    assert q.weight is not None
    if q.target.warp_size == 64:
        raise ValueError("the one-launch forward is not for AMD: a barrier there does not wait for other waves' stores")
    if q.r_block > tiles.ONE_LAUNCH_WIDTH:
        raise ValueError(f"r + s is {q.width}; the one-launch forward takes at most {tiles.ONE_LAUNCH_WIDTH}")
    tiles_m = tile_count(q.m, tile.block_m)
    count = tiles_m * tile_count(q.n, tile.block_n)
    adapters = q.adapter_args("abuv")
    return Launch(
        fwd.one_launch_forward,
        (min(count, q.target.processors),),
        {
            "x": q.x, "w": q.weight, **adapters, "dash_sigma": q.sigma(), "bias": bias,
            "seed": q.seed if q.dropout else None, "p": p, "t": q.empty(q.m, q.r_block), "y": y,
            "state": q.x.new_zeros(2 * tiles_m, dtype=torch.int32), "M": q.m, "N": q.n, "K": q.k,
            "stride_xm": q.x.stride(0), "stride_xk": q.x.stride(1), "stride_wn": q.weight.stride(0),
            "stride_wk": q.weight.stride(1), "scaling": q.scaling, "keep_scale": q.keep_scale,
            "threshold": q.threshold,
        },
        {
            "RANK": q.rank, "DIRECTIONS": q.directions, "R_BLOCK": q.r_block, "BLOCK_M": tile.block_m,
            "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k, "GROUP_M": tile.group_m,
            # Triton 3.8 pipelines two wgmma products of one loop with a buffer too few: a copy overwrites what the
            # second still reads.
            "FIRST_STAGES": 1 if q.target.asynchronous else tile.num_stages, "DROPOUT": q.dropout,
            "EVEN_K": q.k % tile.block_k == 0, "WIDE": wide(q.x, q.weight, *adapters.values()),
            "PRECISION": q.precision,
        },
        tile.num_warps,
        tile.num_stages,
    )  # fmt: skip


def plan_backward(
    q: Problem, dy: Tensor, p: Tensor, dx: Tensor | None, da: Tensor | None, db_lora: Tensor | None,
    dsigma: Tensor | None, dbias: Tensor | None, strategy: Strategy | None = None,
) -> list[Launch | LibraryProduct]:  # fmt: skip
    """The wanted ones of dx (M, K), dA (r, K), dB (N, r), d(sigma) (s,), db (N,)."""
    if q.m == 0 or q.n == 0:
        for grad in (dx, da, db_lora, dsigma, dbias):
            if grad is not None:
                grad.zero_()
        return []
    da, db_lora, dsigma = (g if g is not None and g.numel() else None for g in (da, db_lora, dsigma))
    dx = dx if dx is not None and dx.numel() else None
    needs_g = q.width > 0 and any(g is not None for g in (dx, da, dsigma))
    f32 = accumulator(q.x.dtype)
    launches: list[Launch | LibraryProduct] = []

    tile = tiles.pick_dy(q.target, q.itemsize, q.r_block)
    parts, (splits, rows) = tile_count(q.n, tile.block_n), _splits(q, q.n, tile.block_n, tile.block_m)
    g_part = q.empty(parts, q.m, q.width, dtype=f32) if needs_g else None
    db_part = q.empty(splits, q.rank, q.n, dtype=f32) if db_lora is not None else None
    dbias_part = q.empty(splits, q.n, dtype=f32) if dbias is not None else None
    if needs_g or db_part is not None or dbias_part is not None:
        launches.append(_dy_pass(q, tile, (parts, splits), rows, dy, p, g_part, db_part, dbias_part))

    t = d = dsigma_part = None
    m_padded, k_padded = round_up(q.m, _PAD), round_up(q.k, _PAD)
    sum_tiles = m_padded // _SUM_ROWS
    if g_part is not None:
        t, d = q.empty(q.r_block, m_padded), q.empty(q.r_block, k_padded)
        dsigma_part = q.empty(sum_tiles, q.r_block, dtype=f32) if dsigma is not None else None
        launches.append(_sum_g(q, sum_tiles, p, g_part, t, d, dsigma_part))
    if dx is not None:
        launches += _dx(q, dy, t, d, dx, strategy or Strategy())
    da_part, x_splits = None, 0
    if da is not None and t is not None:
        tile = tiles.pick_x(q.target, q.itemsize, q.rank_block)
        x_splits, rows = _splits(q, q.k, tile.block_k, tile.block_m)
        da_part = q.empty(x_splits, q.rank, q.k, dtype=f32)
        launches.append(_x_pass(q, tile, x_splits, rows, t, da_part))
    launches += _finish(
        q, splits, x_splits, sum_tiles, (da_part, db_part, dbias_part, dsigma_part), (da, db_lora, dbias, dsigma)
    )
    return launches


def _dy_pass(
    q: Problem, tile: TileConfig, grid: tuple[int, int], rows: int, dy: Tensor, p: Tensor, g_part: Tensor | None,
    db_part: Tensor | None, dbias_part: Tensor | None,
) -> Launch:  # fmt: skip
    adapters = q.adapter_args("bu")
    return Launch(
        bwd.dy_pass,
        grid,
        {
            "dy": dy, **adapters, "p": p, "g_part": g_part, "db_part": db_part, "dbias_part": dbias_part, "M": q.m,
            "N": q.n, "stride_ym": dy.stride(0), "stride_yn": dy.stride(1), "rows_per_split": rows,
        },
        {
            "RANK": q.rank, "DIRECTIONS": q.directions, "R_BLOCK": q.r_block, "RANK_BLOCK": q.rank_block,
            "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "EVEN_N": q.n % tile.block_n == 0,
            "WIDE": wide(dy, *adapters.values()), "PRECISION": q.precision,
        },
        tile.num_warps,
        tile.num_stages,
    )  # fmt: skip


def _sum_g(
    q: Problem, tiles_m: int, p: Tensor, g_part: Tensor, t: Tensor, d: Tensor, dsigma_part: Tensor | None
) -> Launch:
    adapters = q.adapter_args("av")
    pack_k = min(_PAD, 8192 // q.r_block)
    return Launch(
        bwd.sum_g,
        (tiles_m + d.shape[1] // pack_k,),
        {
            "g_part": g_part, "p": p, "dash_sigma": q.sigma(), **adapters, "t": t, "d": d, "dsigma_part": dsigma_part,
            "M": q.m, "K": q.k, "m_padded": t.shape[1], "k_padded": d.shape[1], "parts": g_part.shape[0],
            "tiles_m": tiles_m, "scaling": q.scaling,
        },
        {
            "RANK": q.rank, "DIRECTIONS": q.directions, "R_BLOCK": q.r_block, "BLOCK_M": _SUM_ROWS, "PACK_K": pack_k,
            "WIDE": wide(*adapters.values()),
        },
        8 if q.r_block >= 128 else 4,
    )  # fmt: skip


def _dx(
    q: Problem, dy: Tensor, t: Tensor | None, d: Tensor | None, dx: Tensor, strategy: Strategy
) -> list[Launch | LibraryProduct]:
    depth = 1 if strategy.kind == "library" else q.n
    tile = strategy.tile or tiles.pick_gemm(q.target, q.itemsize, q.m, q.k, depth, q.r_block)
    launches: list[Launch | LibraryProduct] = []
    weight, n, base = q.weight, q.n, None
    if weight is not None and strategy.kind == "descriptors" and descriptors_fit(q, dy, weight):
        return [_descriptor_dx(q, tile, dy, weight, t, d, dx)]
    if strategy.kind == "library" and weight is not None:
        launches.append(LibraryProduct(dy, weight, None, dx, False))
        if t is None:
            return launches
        weight, base = None, dx
    if weight is None:
        weight, n = q.x, 0
    launches.append(
        Launch(
            bwd.dx_gemm,
            (tile_count(q.m, tile.block_m) * tile_count(q.k, tile.block_n),),
            {
                "dy": dy, "w": weight, "t": t, "d": d, "seed": q.seed if q.dropout else None, "base": base, "dx": dx,
                "M": q.m, "N": n, "K": q.k, "m_padded": 0 if t is None else t.shape[1],
                "k_padded": 0 if d is None else d.shape[1], "stride_ym": dy.stride(0), "stride_yn": dy.stride(1),
                "stride_wn": weight.stride(0), "stride_wk": weight.stride(1), "keep_scale": q.keep_scale,
                "threshold": q.threshold,
            },
            {
                "R_BLOCK": q.r_block, "RANK_STEP": min(q.r_block, _RANK_STEP), "BLOCK_M": tile.block_m,
                "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k, "GROUP_M": tile.group_m, "DROPOUT": q.dropout,
                "EVEN_N": n % tile.block_k == 0, "WIDE": wide(dy, weight), "PRECISION": q.precision,
            },
            tile.num_warps,
            tile.num_stages,
        )
    )  # fmt: skip
    return launches


def _descriptor_dx(
    q: Problem, tile: TileConfig, dy: Tensor, weight: Tensor, t: Tensor | None, d: Tensor | None, dx: Tensor
) -> Launch:
    count = tile_count(q.m, tile.block_m) * tile_count(q.k, tile.block_n)
    return Launch(
        desc.descriptor_dx,
        (min(count, q.target.processors),),
        {
            "dy": descriptor(dy, tile.block_m, tile.block_k), "w": descriptor(weight, tile.block_k, tile.block_n),
            "t": t, "d": d, "seed": q.seed if q.dropout else None, "dx": dx, "M": q.m, "N": q.n, "K": q.k,
            "m_padded": 0 if t is None else t.shape[1], "k_padded": 0 if d is None else d.shape[1],
            "keep_scale": q.keep_scale, "threshold": q.threshold,
        },
        {
            "R_BLOCK": q.r_block, "RANK_STEP": min(q.r_block, _RANK_STEP), "BLOCK_M": tile.block_m,
            "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k, "GROUP_M": tile.group_m, "DROPOUT": q.dropout,
        },
        tile.num_warps,
        tile.num_stages,
    )  # fmt: skip


def _x_pass(q: Problem, tile: TileConfig, splits: int, rows: int, t: Tensor, da_part: Tensor) -> Launch:
    return Launch(
        bwd.x_pass,
        (tile_count(q.k, tile.block_k), splits),
        {
            "x": q.x, "t": t, "seed": q.seed if q.dropout else None, "da_part": da_part, "M": q.m, "K": q.k, "m_padded": t.shape[-1],
            "stride_xm": q.x.stride(0), "stride_xk": q.x.stride(1), "threshold": q.threshold, "rows_per_split": rows,
        },
        {
            "RANK": q.rank, "R_BLOCK": q.r_block, "RANK_BLOCK": q.rank_block, "BLOCK_M": tile.block_m,
            "BLOCK_K": tile.block_k, "DROPOUT": q.dropout, "EVEN_K": q.k % tile.block_k == 0, "WIDE": wide(q.x),
            "PRECISION": q.precision,
        },
        tile.num_warps,
        tile.num_stages,
    )  # fmt: skip


def _finish(
    q: Problem,
    splits: int,
    x_splits: int,
    sum_tiles: int,
    parts: Sequence[Tensor | None],
    grads: Sequence[Tensor | None],
) -> list[Launch]:
    da_part, db_part, dbias_part, dsigma_part = parts
    da, db_lora, dbias, dsigma = grads
    counts = [tile_count(0 if g is None else g.numel(), _FINISH_BLOCK) for g in (da, db_lora, dbias)]
    grid = sum(counts) + (dsigma is not None)
    if grid == 0:
        return []
    return [
        Launch(
            bwd.finish,
            (grid,),
            {
                "da_part": da_part, "db_part": db_part, "dbias_part": dbias_part, "dsigma_part": dsigma_part, "da": da,
                "db_lora": db_lora, "dbias": dbias, "dsigma": dsigma, "K": q.k, "N": q.n, "x_splits": x_splits,
                "y_splits": splits, "sum_tiles": sum_tiles, "a_tiles": counts[0], "b_tiles": counts[1],
                "bias_tiles": counts[2], "scale_a": q.keep_scale, "scale_b": q.scaling,
            },
            {"RANK": q.rank, "DIRECTIONS": q.directions, "R_BLOCK": q.r_block, "BLOCK": _FINISH_BLOCK},
        )
    ]  # fmt: skip


def _splits(q: Problem, columns: int, block: int, block_m: int) -> tuple[int, int]:
    """How many parts M is summed in and the rows of each: twice the processors' programs, at least _MIN_ROWS rows."""
    wanted = max(1, 2 * q.target.processors // tile_count(columns, block))
    rows = round_up(max(_MIN_ROWS, tile_count(q.m, wanted)), block_m)
    return tile_count(q.m, rows), rows
