"""The two large products as persistent kernels on tensor descriptors (TMA), for Hopper and newer.

Same mathematics and operands as `extended_gemm` and `dx_gemm`. Copies are whole boxes issued by one thread, zero beyond
the ends, so there are no masks and no pointer arithmetic in the loops; a program takes tile after tile, its first copies
under way while the processor is still storing the tile before.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .backward import _masked_low_rank
from .common import grouped
from .forward import _store_output


@triton.jit(do_not_specialize=["M"])
def descriptor_forward(
    x, w, t, q, bias, y, M, N, K,
    R_WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, R_STEP: tl.constexpr,
    GROUP_M: tl.constexpr,
):  # fmt: skip
    """y = [x | T] [W | Q]^T + bias. Descriptors: x (M, K), w (N, K), T (M, R_WIDTH), Q (N, R_WIDTH); y (M, N).

    FLOPs: 2 M N (K + R_WIDTH), R_WIDTH a multiple of R_STEP. Bytes: as extended_gemm. Grid: any number of programs.
    """
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), num_stages=1):
        pid_m, pid_n = grouped(tile, tiles_m, tiles_n, GROUP_M)
        m0, n0 = pid_m * BLOCK_M, pid_n * BLOCK_N
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k0 in tl.range(0, K, BLOCK_K):
            acc = tl.dot(x.load([m0, k0]), tl.trans(w.load([n0, k0])), acc)
        if R_WIDTH > 0:
            for r0 in tl.range(0, R_WIDTH, R_STEP):
                acc = tl.dot(t.load([m0, r0]), tl.trans(q.load([n0, r0])), acc)
        _store_output(acc, bias, None, y, m0, n0, M, N, 0, 0, BLOCK_M, BLOCK_N)


@triton.jit(do_not_specialize=["M", "threshold"])
def descriptor_dx(
    dy, w, t, d, seed, dx, M, N, K, m_padded, k_padded, keep_scale, threshold,
    R_BLOCK: tl.constexpr, RANK_STEP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """dx (M, K) = mask * (T^T D) * keep_scale + dy W. Descriptors: dy (M, N), w (N, K); T and D from sum_g.

    FLOPs: 2 M K (N + R_BLOCK). Bytes: as dx_gemm. Grid: any number of programs.
    """
    tiles_m, tiles_k = tl.cdiv(M, BLOCK_M), tl.cdiv(K, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_k, tl.num_programs(0), num_stages=1):
        pid_m, pid_k = grouped(tile, tiles_m, tiles_k, GROUP_M)
        m0, k0 = pid_m * BLOCK_M, pid_k * BLOCK_N
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        if t is not None:
            acc = _masked_low_rank(
                acc, t, d, seed, m0, k0, m_padded, k_padded, keep_scale, threshold, R_BLOCK, RANK_STEP, DROPOUT, "ieee"
            )
        for n0 in tl.range(0, N, BLOCK_K):
            acc = tl.dot(dy.load([m0, n0]), w.load([n0, k0]), acc)
        _store_output(acc, None, None, dx, m0, k0, M, K, 0, 0, BLOCK_M, BLOCK_N)
