"""The launches of a forward call: which kernels, with which arguments, tiles and workspace.

A plan is data: `run` executes it on a GPU (or in Triton's interpreter); the tests also compile every launch of it for
each architecture and execute the result in an emulator.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ....calls import ForwardCall
from .. import tiles
from ..kernels import descriptor as desc
from ..kernels import forward as fwd
from ..problem import (
    KernelLaunch,
    LibraryProduct,
    Plan,
    Problem,
    descriptor,
    power_of_two,
    round_up,
    strides,
    tile_count,
    wide,
)
from ..strategies import DEFAULT, Strategy, descriptors_fit
from ..target import TileConfig

_PACK_N = 64


def plan_forward(problem: Problem[ForwardCall], strategy: Strategy | None = None) -> Plan:
    """y (M, N) and P (M, R). `base` (M, N) replaces the base product where there is no weight."""
    if problem.m == 0:
        return []
    strategy = strategy or DEFAULT
    call, weight, target, itemsize = problem.call, problem.weight, problem.target, problem.itemsize
    base, bias = call.base, None if call.bias is None else call.bias.contiguous()
    if strategy.kind == "one_launch" and weight is not None and problem.width and problem.n:
        tile = strategy.tile or tiles.pick_one_launch(target, itemsize, problem.m, problem.n)
        return [_one_launch(problem, tile, weight, bias)]
    product = None
    if strategy.kind == "library" and weight is not None:
        if not problem.width:
            return [LibraryProduct(problem.x, weight, bias, call.y, transposed=True, accumulate=False)]
        # The low-rank terms and the bias are written first: the library adds what is there in its own epilogue.
        product = LibraryProduct(problem.x, weight, None, call.y, transposed=True, accumulate=True)
        weight = None
    # Where only rank columns are summed there is no room for the tightest tiles.
    depth = 1 if weight is None else problem.k
    tile = strategy.tile or tiles.pick_gemm(target, itemsize, problem.m, problem.n, depth, problem.r_block)
    by_descriptors = strategy.kind == "descriptors" and descriptors_fit(problem, problem.x, weight)
    r_step = min(tile.block_k, problem.r_block) if by_descriptors else tile.block_k
    r_width = round_up(problem.width, r_step)
    t = packed = problem.x
    launches: Plan = []
    if problem.width:
        t, packed = problem.empty(problem.m, r_width), _packed_q(problem, r_width)
        launches.append(_down(problem, r_width, t, packed))
    if by_descriptors and weight is not None:
        launches.append(_descriptor_forward(problem, tile, weight, r_step, r_width, t, packed, bias))
    elif call.y.numel():
        launches.append(_extended_gemm(problem, tile, weight, r_width, t, packed, bias, base))
    return [*launches, product] if product else launches


def _packed_q(problem: Problem[ForwardCall], r_width: int) -> Tensor:
    """Room for Q (N, r_width), in the order of W: a tile that is read along N reads both along N."""
    weight = problem.weight
    if weight is not None and weight.stride(0) == 1 and weight.stride(1) != 1:
        return problem.empty_columns(problem.n, r_width)
    return problem.empty(problem.n, r_width)


def _down(problem: Problem[ForwardCall], r_width: int, t: Tensor, packed: Tensor) -> KernelLaunch:
    x, m, k, n = problem.x, problem.m, problem.k, problem.n
    tile = tiles.pick_down(problem.target, problem.itemsize, m, problem.r_block)
    tiles_m = tile_count(m, tile.block_m)
    adapters = problem.adapter_args("abuv")
    return KernelLaunch(
        fwd.down_projection,
        (tiles_m + tile_count(n, _PACK_N),),
        {
            "x": x, **adapters, "dash_sigma": problem.dash_sigma, "seed": problem.seed, "p": problem.call.p, "t": t,
            "q": packed, "M": m, "K": k, "N": n, **strides(x, "xm xk"), **strides(packed, "qn qr"),
            "scaling": problem.scaling, "keep_scale": problem.keep_scale, "threshold": problem.threshold,
            "tiles_m": tiles_m,
        },
        {
            **problem.rank_constants, "R_WIDTH": r_width, "R_STORE": power_of_two(r_width), "BLOCK_M": tile.block_m,
            "BLOCK_K": tile.block_k, "PACK_N": _PACK_N, "DROPOUT": problem.dropout, "EVEN_K": k % tile.block_k == 0,
            "WIDE": wide(x, *adapters.values()), "PRECISION": problem.precision,
        },
        tile.num_warps,
        problem.stages(tile),
    )  # fmt: skip


def _extended_gemm(
    problem: Problem[ForwardCall],
    tile: TileConfig,
    weight: Tensor | None,
    r_width: int,
    t: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    base: Tensor | None,
) -> KernelLaunch:
    """Without a weight the K loop goes over the rank columns alone."""
    x, m, n = problem.x, problem.m, problem.n
    w, k = (packed, 0) if weight is None else (weight, problem.k)
    return KernelLaunch(
        fwd.extended_gemm,
        (tile_count(m, tile.block_m) * tile_count(n, tile.block_n),),
        {
            "x": x, "w": w, "t": t, "q": packed, "bias": bias, "base": base, "y": problem.call.y, "M": m, "N": n,
            "K": k, **strides(x, "xm xk"), **strides(w, "wn wk"), **strides(packed, "qn qr"), **strides(base, "bm bn"),
        },
        {
            "R_WIDTH": r_width, **tile.constants(), "EVEN_K": k % tile.block_k == 0, "WIDE": wide(x, w),
            "PRECISION": problem.precision,
        },
        tile.num_warps,
        problem.stages(tile),
    )  # fmt: skip


def _descriptor_forward(
    problem: Problem[ForwardCall],
    tile: TileConfig,
    weight: Tensor,
    r_step: int,
    r_width: int,
    t: Tensor,
    packed: Tensor,
    bias: Tensor | None,
) -> KernelLaunch:
    count = tile_count(problem.m, tile.block_m) * tile_count(problem.n, tile.block_n)
    return KernelLaunch(
        desc.descriptor_forward,
        (min(count, problem.target.processors),),
        {
            "x": descriptor(problem.x, tile.block_m, tile.block_k), "w": descriptor(weight, tile.block_n, tile.block_k),
            "t": descriptor(t, tile.block_m, r_step) if r_width else None,
            "q": descriptor(packed, tile.block_n, r_step) if r_width else None, "bias": bias, "y": problem.call.y,
            "M": problem.m, "N": problem.n, "K": problem.k,
        },
        {"R_WIDTH": r_width, **tile.constants(), "R_STEP": r_step},
        tile.num_warps,
        tile.num_stages,
    )  # fmt: skip


def _one_launch(problem: Problem[ForwardCall], tile: TileConfig, weight: Tensor, bias: Tensor | None) -> KernelLaunch:
    target = problem.target
    if target.warp_size == 64:
        raise ValueError("the one-launch forward is not for AMD: a barrier there does not wait for other waves' stores")
    if problem.r_block > tiles.ONE_LAUNCH_WIDTH:
        raise ValueError(f"r + s is {problem.width}; the one-launch forward takes at most {tiles.ONE_LAUNCH_WIDTH}")
    x, m, k, n = problem.x, problem.m, problem.k, problem.n
    tiles_m = tile_count(m, tile.block_m)
    adapters = problem.adapter_args("abuv")
    # Triton 3.8 pipelines two wgmma products of one loop with a buffer too few: a copy overwrites what the second still
    # reads.
    first_stages = 1 if target.asynchronous else problem.stages(tile)
    return KernelLaunch(
        fwd.one_launch_forward,
        (min(tiles_m * tile_count(n, tile.block_n), target.processors),),
        {
            "x": x, "w": weight, **adapters, "dash_sigma": problem.dash_sigma, "bias": bias, "seed": problem.seed,
            "p": problem.call.p, "t": problem.empty(m, problem.r_block), "y": problem.call.y,
            "state": problem.zeros(2 * tiles_m, torch.int32), "M": m, "N": n, "K": k, **strides(x, "xm xk"),
            **strides(weight, "wn wk"), "scaling": problem.scaling, "keep_scale": problem.keep_scale,
            "threshold": problem.threshold,
        },
        {
            **problem.rank_constants, **tile.constants(), "FIRST_STAGES": first_stages, "DROPOUT": problem.dropout,
            "EVEN_K": k % tile.block_k == 0, "WIDE": wide(x, weight, *adapters.values()),
            "PRECISION": problem.precision,
        },
        tile.num_warps,
        problem.stages(tile),
    )  # fmt: skip
