"""Forward kernels: y = x W^T + b + (P * c) Q^T with P = dropout(x) D^T.

Two launches. `down_projection` reads x once and writes P, T = P * c and Q, the two operands of the rank columns in the
dtype of x. `extended_gemm` multiplies [x | T] [W | Q]^T: the K loop goes on for R columns more.
One launch, optional: `one_launch_forward`. The first program to arrive at a block of rows accumulates P from the tiles
of x that it multiplies anyway and publishes T; the others wait for it after their own K loop.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import column_factors, grouped, keep_mask, operand_tile, span, stacked


@triton.jit
def _store_low_rank(
    acc, p, t, dash_sigma, m0, M, scaling, keep_scale,
    RANK: tl.constexpr, DIRECTIONS: tl.constexpr, R_BLOCK: tl.constexpr, R_WIDTH: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """P (M, R) fp32, and T = P * c (M, R_WIDTH), zero beyond R."""
    ranks = tl.arange(0, R_BLOCK)[None, :]
    rows = tl.cast(m0, tl.int64) + tl.arange(0, BLOCK_M)[:, None]
    acc *= keep_scale
    tl.store(p + rows * (RANK + DIRECTIONS) + ranks, acc, mask=(rows < M) & (ranks < RANK + DIRECTIONS))
    scaled = acc * column_factors(dash_sigma, scaling, ranks, RANK, DIRECTIONS)
    tl.store(t + rows * R_WIDTH + ranks, scaled.to(t.dtype.element_ty), mask=(rows < M) & (ranks < R_WIDTH))
    if R_WIDTH > R_BLOCK:
        rest = tl.arange(0, R_WIDTH)[None, :]
        zeros = tl.zeros((BLOCK_M, R_WIDTH), t.dtype.element_ty)
        tl.store(t + rows * R_WIDTH + rest, zeros, mask=(rows < M) & (rest >= R_BLOCK))


@triton.jit
def _pack_q(
    lora_b, dash_u, q, n0, N, stride_bn, stride_br, stride_un, stride_us, stride_qn, stride_qr,
    RANK: tl.constexpr, DIRECTIONS: tl.constexpr, R_WIDTH: tl.constexpr, R_STORE: tl.constexpr, PACK_N: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Rows n0 to n0 + PACK_N of Q = [B | U] (N, R_WIDTH) in the dtype of q, zero beyond R."""
    rows, ranks = tl.cast(n0, tl.int64) + tl.arange(0, PACK_N)[:, None], span(R_STORE, WIDE)[None, :]
    dtype: tl.constexpr = q.dtype.element_ty
    tile = stacked(lora_b, stride_br, stride_bn, dash_u, stride_us, stride_un, ranks, rows, N, RANK, DIRECTIONS, dtype)
    tl.store(q + rows * stride_qn + ranks * tl.cast(stride_qr, tl.int64), tile, mask=(rows < N) & (ranks < R_WIDTH))


@triton.jit(do_not_specialize=["M", "threshold", "tiles_m"])
def down_projection(
    x, lora_a, lora_b, dash_u, dash_vt, dash_sigma, seed, p, t, q,
    M, K, N, stride_xm, stride_xk, stride_ar, stride_ak, stride_bn, stride_br, stride_un, stride_us, stride_vs, stride_vk,
    stride_qn, stride_qr, scaling, keep_scale, threshold, tiles_m,
    RANK: tl.constexpr, DIRECTIONS: tl.constexpr, R_BLOCK: tl.constexpr, R_WIDTH: tl.constexpr, R_STORE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, PACK_N: tl.constexpr,
    DROPOUT: tl.constexpr, EVEN_K: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """P = dropout(x) D^T (M, R) fp32, T = P * c (M, R_WIDTH); programs from tiles_m on pack Q (N, R_WIDTH).

    FLOPs: 2 M K R (R padded to R_BLOCK). Bytes: x once; D once per block of rows, from L2; P, T and Q are R / K of x
    and W. Grid: tiles_m + ceil(N / PACK_N).
    """
    pid = tl.program_id(0)
    if pid >= tiles_m:
        n0 = (pid - tiles_m) * PACK_N
        _pack_q(
            lora_b, dash_u, q, n0, N, stride_bn, stride_br, stride_un, stride_us, stride_qn, stride_qr,
            RANK, DIRECTIONS, R_WIDTH, R_STORE, PACK_N, WIDE,
        )  # fmt: skip
        return
    m0 = pid * BLOCK_M
    x += tl.cast(m0, tl.int64) * stride_xm
    rows, ks = span(BLOCK_M, WIDE)[:, None], span(BLOCK_K, WIDE)
    ranks = span(R_BLOCK, WIDE)[None, :]
    dtype: tl.constexpr = x.dtype.element_ty
    acc = tl.zeros((BLOCK_M, R_BLOCK), tl.float32)
    for k0 in tl.range(0, K, BLOCK_K):
        step = tl.cast(k0, tl.int64)
        tile = operand_tile(x, k0, rows, ks[None, :], M - m0, K - k0, stride_xm, stride_xk, EVEN_K)
        d = stacked(
            lora_a + step * stride_ak, stride_ar, stride_ak, None if DIRECTIONS == 0 else dash_vt + step * stride_vk,
            stride_vs, stride_vk, ranks, ks[:, None], K - k0, RANK, DIRECTIONS, dtype,
        )  # fmt: skip
        if DROPOUT:
            tile = tl.where(keep_mask(seed, threshold, m0, k0, DROPOUT, BLOCK_M, BLOCK_K), tile, 0.0)
        acc = tl.dot(tile, d, acc, input_precision=PRECISION)
    _store_low_rank(
        acc, p, t, dash_sigma, m0, M, scaling, keep_scale, RANK, DIRECTIONS, R_BLOCK, R_WIDTH, BLOCK_M
    )  # fmt: skip


@triton.jit
def _store_output(acc, bias, base, y, m0, n0, M, N, stride_bm, stride_bn, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """y tile = acc + bias + base; y (M, N) contiguous, base of any strides."""
    rows, columns = tl.cast(m0, tl.int64) + tl.arange(0, BLOCK_M)[:, None], n0 + tl.arange(0, BLOCK_N)[None, :]
    inside = (rows < M) & (columns < N)
    if bias is not None:
        acc += tl.load(bias + columns, mask=columns < N, other=0.0).to(tl.float32)
    if base is not None:
        offsets = rows * stride_bm + columns.to(tl.int64) * stride_bn
        acc += tl.load(base + offsets, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + rows * N + columns, acc.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["M"])
def extended_gemm(
    x, w, t, q, bias, base, y,
    M, N, K, stride_xm, stride_xk, stride_wn, stride_wk, stride_qn, stride_qr, stride_bm, stride_bn,
    R_WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    EVEN_K: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y = [x | T] [W | Q]^T + bias + base. x (M, K), w (N, K) of any strides; T (M, R_WIDTH) contiguous, Q (N, R_WIDTH)
    in the order of w.

    FLOPs: 2 M N (K + R_WIDTH); R_WIDTH is a multiple of BLOCK_K. Bytes: x, W, y once, as far as L2 holds a group of
    tiles. The rank columns are steps of the K loop: one pipeline, whose pointers change in the last steps. K = 0: the
    rank columns alone, on top of `base` (low_rank_update) or for a library to add its product to. Grid: tiles of M times
    tiles of N.
    """
    pid_m, pid_n = grouped(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    m0, n0 = pid_m * BLOCK_M, pid_n * BLOCK_N
    x += tl.cast(m0, tl.int64) * stride_xm
    w += tl.cast(n0, tl.int64) * stride_wn
    t += tl.cast(m0, tl.int64) * R_WIDTH
    q += tl.cast(n0, tl.int64) * stride_qn
    rows, columns, ks = span(BLOCK_M, WIDE)[:, None], span(BLOCK_N, WIDE)[None, :], span(BLOCK_K, WIDE)
    base_steps = tl.cdiv(K, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in tl.range(0, base_steps + R_WIDTH // BLOCK_K):
        low = step >= base_steps
        k0 = tl.where(low, step - base_steps, step) * BLOCK_K
        a, b = tl.where(low, t, x), tl.where(low, q, w)
        stride_ak, stride_bk = tl.where(low, 1, stride_xk), tl.where(low, stride_qr, stride_wk)
        a += tl.cast(k0, tl.int64) * stride_ak
        b += tl.cast(k0, tl.int64) * stride_bk
        mask_a, mask_b = rows < M - m0, columns < N - n0
        if not EVEN_K:
            left = tl.where(low, R_WIDTH, K) - k0
            mask_a, mask_b = mask_a & (ks[None, :] < left), mask_b & (ks[:, None] < left)
        a_tile = tl.load(a + rows * tl.where(low, R_WIDTH, stride_xm) + ks[None, :] * stride_ak, mask=mask_a, other=0.0)
        b_tile = tl.load(
            b + columns * tl.where(low, stride_qn, stride_wn) + ks[:, None] * stride_bk, mask=mask_b, other=0.0
        )
        acc = tl.dot(a_tile, b_tile, acc, input_precision=PRECISION)
    _store_output(acc, bias, base, y, m0, n0, M, N, stride_bm, stride_bn, BLOCK_M, BLOCK_N)


@triton.jit(do_not_specialize=["M", "threshold"])
def one_launch_forward(
    x, w, lora_a, lora_b, dash_u, dash_vt, dash_sigma, bias, seed, p, t, y, state,
    M, N, K, stride_xm, stride_xk, stride_wn, stride_wk, stride_ar, stride_ak, stride_bn, stride_br, stride_un, stride_us,
    stride_vs, stride_vk, scaling, keep_scale, threshold,
    RANK: tl.constexpr, DIRECTIONS: tl.constexpr, R_BLOCK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, FIRST_STAGES: tl.constexpr, DROPOUT: tl.constexpr,
    EVEN_K: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The whole forward in one persistent launch. state: 2 * ceil(M / BLOCK_M) int32, zero on entry.

    FLOPs: those of two launches. Bytes: x, W, y once, P and T (M, R_BLOCK) once. state[b] counts arrivals at block b of
    rows, state[tiles + b] says that its T is there. Only the first to arrive is ever waited for, and it waits for
    nobody: programs need not be resident together. FIRST_STAGES is the depth of the first program's
    pipeline, which has two products.
    """
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    dtype: tl.constexpr = x.dtype.element_ty
    rows, columns, ks = span(BLOCK_M, WIDE)[:, None], span(BLOCK_N, WIDE)[None, :], span(BLOCK_K, WIDE)
    ranks = span(R_BLOCK, WIDE)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), num_stages=1):
        pid_m, pid_n = grouped(tile, tiles_m, tiles_n, GROUP_M)
        m0, n0 = pid_m * BLOCK_M, pid_n * BLOCK_N
        a, b = x + tl.cast(m0, tl.int64) * stride_xm, w + tl.cast(n0, tl.int64) * stride_wn
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        first = tl.atomic_add(state + pid_m, 1, sem="relaxed") == 0
        if first:
            low = tl.zeros((BLOCK_M, R_BLOCK), tl.float32)
            for k0 in tl.range(0, K, BLOCK_K, num_stages=FIRST_STAGES):
                step = tl.cast(k0, tl.int64)
                a_tile = operand_tile(a, k0, rows, ks[None, :], M - m0, K - k0, stride_xm, stride_xk, EVEN_K)
                b_tile = operand_tile(b, k0, columns, ks[:, None], N - n0, K - k0, stride_wn, stride_wk, EVEN_K)
                d = stacked(
                    lora_a + step * stride_ak, stride_ar, stride_ak,
                    None if DIRECTIONS == 0 else dash_vt + step * stride_vk, stride_vs, stride_vk,
                    ranks[None, :], ks[:, None], K - k0, RANK, DIRECTIONS, dtype,
                )  # fmt: skip
                kept = a_tile
                if DROPOUT:
                    kept = tl.where(keep_mask(seed, threshold, m0, k0, DROPOUT, BLOCK_M, BLOCK_K), a_tile, 0.0)
                low = tl.dot(kept, d, low, input_precision=PRECISION)
                acc = tl.dot(a_tile, b_tile, acc, input_precision=PRECISION)
            _store_low_rank(
                low, p, t, dash_sigma, m0, M, scaling, keep_scale, RANK, DIRECTIONS, R_BLOCK, R_BLOCK, BLOCK_M
            )  # fmt: skip
            # Every warp's part of T is written before one thread releases it.
            tl.debug_barrier()
            tl.atomic_xchg(state + tiles_m + pid_m, 1, sem="release")
        else:
            for k0 in tl.range(0, K, BLOCK_K):
                a_tile = operand_tile(a, k0, rows, ks[None, :], M - m0, K - k0, stride_xm, stride_xk, EVEN_K)
                b_tile = operand_tile(b, k0, columns, ks[:, None], N - n0, K - k0, stride_wn, stride_wk, EVEN_K)
                acc = tl.dot(a_tile, b_tile, acc, input_precision=PRECISION)
            while tl.atomic_add(state + tiles_m + pid_m, 0, sem="acquire") == 0:
                pass
        t_rows = tl.cast(m0, tl.int64) + rows
        t_tile = tl.load(t + t_rows * R_BLOCK + ranks[None, :], mask=t_rows < M, other=0.0)
        q_tile = stacked(
            lora_b + tl.cast(n0, tl.int64) * stride_bn, stride_br, stride_bn,
            None if DIRECTIONS == 0 else dash_u + tl.cast(n0, tl.int64) * stride_un, stride_us, stride_un,
            ranks[:, None], columns, N - n0, RANK, DIRECTIONS, dtype,
        )  # fmt: skip
        acc = tl.dot(t_tile, q_tile, acc, input_precision=PRECISION)
        _store_output(acc, bias, None, y, m0, n0, M, N, 0, 0, BLOCK_M, BLOCK_N)
