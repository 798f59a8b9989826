"""What the forward and the backward kernels share: index arithmetic, the dropout mask, and adapter tiles.

Letters as everywhere: M tokens, K in_features, N out_features, r LoRA rank, s directions, R = r + s,
D = [A; Vt] (R, K), Q = [B | U] (N, R), c = [scaling; sigma] (R,).
"""

from __future__ import annotations

import triton
import triton.language as tl

# mul, which triton.language does not name before Triton 3.6.
from triton.language import core


@triton.jit
def span(SIZE: tl.constexpr, WIDE: tl.constexpr):
    """0, 1, ..., SIZE - 1; 64-bit where a stride times SIZE may exceed 2^31."""
    index = tl.arange(0, SIZE)
    if WIDE:
        index = index.to(tl.int64)
    return index


@triton.jit
def grouped(pid, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """Tile (m, n) of a program: GROUP_M rows of tiles at a time, so that neighbours share operands in L2."""
    group = pid // (GROUP_M * tiles_n)
    first = group * GROUP_M
    height = tl.minimum(tiles_m - first, GROUP_M)
    inside = pid % (GROUP_M * tiles_n)
    return first + inside % height, inside // height


@triton.jit
def operand_tile(base, k0, outer, ks, outer_left, left, stride_outer, stride_k, EVEN: tl.constexpr):
    """The part from depth k0 of an operand's tile; outer and ks broadcast to it, in either order.

    Zero from outer_left on, and from depth `left` on unless EVEN says that tiles end where the operand does.
    """
    mask = outer < outer_left
    if not EVEN:
        mask = mask & (ks < left)
    offsets = tl.cast(k0, tl.int64) * stride_k + outer * stride_outer + ks * stride_k
    return tl.load(base + offsets, mask=mask, other=0.0)


@triton.jit
def philox(key, c0, c1, c2, c3):
    """Philox4x32-10 (Salmon et al., SC 2011): four 32-bit words of the counter (c0, c1, c2, c3) under a 64-bit key.

    Counters broadcast as late as they can: with c0 a row and c1 a column, two of the ten rounds and a half cost nothing
    per element. Words 0 and 2 come in the shape of the whole, as do 1 and 3.
    """
    M0: tl.constexpr = 0xD2511F53
    M1: tl.constexpr = 0xCD9E8D57
    W0: tl.constexpr = 0x9E3779B9
    W1: tl.constexpr = 0xBB67AE85
    k0, k1 = key.to(tl.uint32), (key >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        high0, low0 = tl.umulhi(c0, M0), core.mul(c0, M0, sanitize_overflow=False)
        high1, low1 = tl.umulhi(c2, M1), core.mul(c2, M1, sanitize_overflow=False)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = tl.add(k0, W0, sanitize_overflow=False), tl.add(k1, W1, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def keep_mask(seed, threshold, m0, k0, NUMBERS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """Keep bits (BLOCK_M, BLOCK_K) of elements (m0 + i, k0 + j).

    Philox counter (k // 8, m, offset), key seed; half-word k % 8 of the block is compared with the threshold. k0 is a
    multiple of 8. NUMBERS: those of the seed, 2, or 4 where m and k are counted from the place of a window.
    """
    key, offset = tl.load(seed), tl.load(seed + 1)
    block, row = tl.cast(k0 // 8, tl.uint32), tl.cast(m0, tl.uint32)
    if NUMBERS == 4:
        block, row = block + (tl.load(seed + 3) // 8).to(tl.uint32), row + tl.load(seed + 2).to(tl.uint32)
    c0 = (block + tl.arange(0, BLOCK_K // 8).to(tl.uint32))[None, :]
    c1 = (row + tl.arange(0, BLOCK_M).to(tl.uint32))[:, None]
    c0, c1, c2, c3 = philox(key, c0, c1, offset.to(tl.uint32), (offset >> 32).to(tl.uint32))
    words = tl.join(tl.join(c0, c2), tl.join(c1, c3))  # (.., .., 2, 2): words 0 1 / 2 3
    halves = tl.join(words & 0xFFFF, words >> 16)
    return tl.reshape(halves, (BLOCK_M, BLOCK_K)) >= threshold


@triton.jit
def stacked(
    first, first_rank, first_other, second, second_rank, second_other, ranks, others, limit,
    RANK: tl.constexpr, DIRECTIONS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """A tile of [A; Vt] or [B | U]: rank indices below RANK from `first`, the following DIRECTIONS from `second`.

    `ranks` and `others` broadcast to the tile; others < limit. Cast to DTYPE; zero outside.
    """
    inside = others < limit
    tile = tl.load(first + ranks * first_rank + others * first_other, mask=(ranks < RANK) & inside, other=0.0).to(DTYPE)
    if DIRECTIONS > 0:
        below = (ranks >= RANK) & (ranks < RANK + DIRECTIONS) & inside
        offsets = (ranks - RANK) * second_rank + others * second_other
        tile = tl.where(ranks < RANK, tile, tl.load(second + offsets, mask=below, other=0.0).to(DTYPE))
    return tile


@triton.jit
def column_factors(sigma, scaling, ranks, RANK: tl.constexpr, DIRECTIONS: tl.constexpr):
    """c for the given rank indices, fp32; zero beyond R."""
    factors = tl.where(ranks < RANK, scaling, 0.0)
    if DIRECTIONS > 0:
        inside = (ranks >= RANK) & (ranks < RANK + DIRECTIONS)
        factors += tl.load(sigma + ranks - RANK, mask=inside, other=0.0).to(tl.float32)
    return factors
