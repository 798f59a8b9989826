"""Which ways a large product may be computed: what `tuning` times, and what a plan may be told."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from ...calls import ForwardCall
from . import tiles
from .problem import Problem
from .target import TileConfig


@dataclass(frozen=True)
class Strategy:
    """How a product is computed: "fused", "descriptors" (the same, persistent, on tensor descriptors where these can read the
    operands), "one_launch" (forward only) or "library" (the vendor's product with our low-rank kernels); and the tile,
    where it is not the table's.
    """

    kind: str = "fused"
    tile: TileConfig | None = None


DEFAULT = Strategy("library")
"""Where nothing was measured: no card is known on which our tiles beat the vendor's."""


def candidates(problem: Problem) -> list[Strategy]:
    """Every strategy that could be fastest for a call: each tile of the table, fused and on descriptors; the one-launch
    forward; the library."""
    call, target = problem.call, problem.target
    left, depth = (call.x, problem.k) if isinstance(call, ForwardCall) else (call.dy, problem.n)
    table = tiles.gemm_table(target, problem.itemsize, depth, problem.r_block)
    found = [Strategy("fused", tile) for tile in table]
    if problem.weight is None:
        return found
    if descriptors_fit(problem, left, problem.weight):
        found += [Strategy("descriptors", tile) for tile in table]
    if isinstance(call, ForwardCall):
        found += [Strategy("one_launch", tile) for tile in one_launch_tiles(problem)]
    return [*found, Strategy("library")]


def one_launch_tiles(problem: Problem) -> list[TileConfig]:
    """The tiles of the one-launch forward that a call may take: within the shared memory of its card, without spills."""
    target = problem.target
    if target.warp_size != 32 or not 0 < problem.r_block <= tiles.ONE_LAUNCH_WIDTH or not problem.width:
        return []
    table = tiles.one_launch_table(target, problem.itemsize)
    fitting = [tile for tile in table if one_launch_bytes(tile, problem.itemsize) <= target.shared_limit]
    return [tile for tile in fitting if not tile.tight or problem.k % tile.block_k == 0]


def one_launch_bytes(tile: TileConfig, itemsize: int) -> int:
    """The most shared memory that the one-launch forward may take: both operands in one stage more than the loop has, which
    leaves room for T, and D of the widest R in fp32. The compiler takes at most 97% of it."""
    more = replace(tile, num_stages=tile.num_stages + 1)
    return more.shared_bytes(itemsize) + tile.num_stages * tile.block_k * tiles.ONE_LAUNCH_WIDTH * 4


def descriptors_fit(problem: Problem, *operands: Tensor | None) -> bool:
    """Can these be read through tensor descriptors: on this card and with this Triton, aligned rows of 16-bit elements, not empty?"""
    return problem.target.descriptors and problem.itemsize == 2 and all(map(_takes_descriptor, operands))


def _takes_descriptor(t: Tensor | None) -> bool:
    if t is None or t.numel() == 0 or t.stride(1) != 1 or t.stride(0) < t.shape[1]:
        return False
    return t.data_ptr() % 16 == 0 and t.stride(0) * t.element_size() % 16 == 0
