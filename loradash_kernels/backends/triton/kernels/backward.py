"""Backward kernels, with G = dy Q and c = [scaling; sigma]:

    dx = dy W + mask * ((G * c) D) / (1 - p)    dA = scaling G_r^T dropout(x)    dB = scaling dy^T P_r
    d(sigma)_i = sum_m G_s P_s                  db = sum_m dy

Five launches. `dy_pass` reads dy once for partial G, dB and db; `sum_g` adds the partial G's and writes T = G * c, the
operand of dx and dA; `dx_gemm`; `x_pass` reads x once for partial dA; `finish` adds the partial sums over M. Where N is so
large that the partial G's would take too much memory, `dy_pass` goes over some columns at a time, and between these
`add_parts` adds up what they left. Every sum over programs is taken in a fixed order: no atomics, the same bits from run
to run.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import column_factors, grouped, keep_mask, operand_tile, span, stacked


@triton.jit(do_not_specialize=["M", "first_tile", "rows_per_split"])
def dy_pass(
    dy, lora_b, dash_u, p, g_part, db_part, dbias_part,
    M, N, first_tile, stride_ym, stride_yn, stride_bn, stride_br, stride_un, stride_us, rows_per_split,
    RANK: tl.constexpr, DIRECTIONS: tl.constexpr, R_BLOCK: tl.constexpr, RANK_BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EVEN_N: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """From BLOCK_N columns and rows_per_split rows of dy: G partial over N, dB and db partial over M.

    g_part (tiles of this launch, M, R), db_part (splits, r, N), dbias_part (splits, N), fp32; null where not wanted. The
    launch begins with tile first_tile of N. Of a launch over all of them, FLOPs: 2 M N (R_BLOCK + RANK_BLOCK). Bytes: dy
    once, Q once per split; partial sums of 4 R M N / BLOCK_N and 4 r M N / rows_per_split bytes. Grid: (tiles, splits).
    """
    WIDTH: tl.constexpr = RANK + DIRECTIONS
    part, split = tl.program_id(0), tl.program_id(1)
    n0 = (first_tile + part) * BLOCK_N
    first, last = split * rows_per_split, tl.minimum(M, (split + 1) * rows_per_split)
    dy += tl.cast(n0, tl.int64) * stride_yn
    rows, columns = span(BLOCK_M, WIDE)[:, None], span(BLOCK_N, WIDE)
    ranks, lora_ranks = span(R_BLOCK, WIDE)[None, :], span(RANK_BLOCK, WIDE)
    dtype: tl.constexpr = dy.dtype.element_ty
    if g_part is not None:
        q = stacked(
            lora_b + tl.cast(n0, tl.int64) * stride_bn, stride_br, stride_bn,
            None if DIRECTIONS == 0 else dash_u + tl.cast(n0, tl.int64) * stride_un, stride_us, stride_un,
            ranks, columns[:, None], N - n0, RANK, DIRECTIONS, dtype,
        )  # fmt: skip
        g_part += tl.cast(part, tl.int64) * M * WIDTH
    db = tl.zeros((RANK_BLOCK, BLOCK_N), tl.float32)
    dbias = tl.zeros((16, BLOCK_N), tl.float32)
    for m0 in tl.range(first, last, BLOCK_M):
        start = tl.cast(m0, tl.int64)
        mask = rows < last - m0
        if not EVEN_N:
            mask = mask & (columns[None, :] < N - n0)
        tile = tl.load(dy + start * stride_ym + rows * stride_ym + columns[None, :] * stride_yn, mask=mask, other=0.0)
        if g_part is not None:
            g = tl.dot(tile, q, input_precision=PRECISION)
            tl.store(g_part + (start + rows) * WIDTH + ranks, g, mask=(rows < last - m0) & (ranks < WIDTH))
        if db_part is not None:
            offsets = (start + rows) * WIDTH + lora_ranks[None, :]
            p_tile = tl.load(p + offsets, mask=(rows < last - m0) & (lora_ranks[None, :] < RANK), other=0.0)
            db = tl.dot(tl.trans(p_tile.to(dtype)), tile, db, input_precision=PRECISION)
        if dbias_part is not None:
            if dtype == tl.float32:
                # A tree of sums: one running sum over M would round 16 times as much.
                dbias += tl.sum(tile, axis=0)[None, :]
            else:
                # A product with ones, the same sum in 16 rows: a sum over registers wants a layout of the tile in shared
                # memory that costs every other product of it bank conflicts.
                dbias = tl.dot(tl.full((16, BLOCK_M), 1.0, tl.float32).to(dtype), tile, dbias)
    inside = columns < N - n0
    if db_part is not None:
        out = db_part + (tl.cast(split, tl.int64) * RANK + lora_ranks[:, None]) * N + n0 + columns[None, :]
        tl.store(out, db, mask=(lora_ranks[:, None] < RANK) & inside[None, :])
    if dbias_part is not None:
        out = dbias_part + tl.cast(split, tl.int64) * N + n0 + columns
        first_row = tl.arange(0, 16)[:, None] == 0
        tl.store(out[None, :] + tl.zeros((16, 1), tl.int32), dbias, mask=first_row & inside[None, :])


@triton.jit(do_not_specialize=["size", "parts", "last"])
def add_parts(g_part, size, parts, last, FIRST: tl.constexpr, BLOCK: tl.constexpr):
    """Part `last` of g_part (last + 1, size) = parts 0 to parts - 1, and but for the FIRST time what it was, fp32.

    Bytes: these parts once. Grid: ceil(size / BLOCK).
    """
    index = tl.cast(tl.program_id(0), tl.int64) * BLOCK + tl.arange(0, BLOCK)
    out = g_part + tl.cast(last, tl.int64) * size + index
    total = tl.zeros((BLOCK,), tl.float32)
    if not FIRST:
        total = tl.load(out, mask=index < size, other=0.0)
    for part in tl.range(0, parts):
        total += tl.load(g_part + tl.cast(part, tl.int64) * size + index, mask=index < size, other=0.0)
    tl.store(out, total, mask=index < size)


@triton.jit(do_not_specialize=["M", "parts", "tiles_m"])
def sum_g(
    g_part, p, dash_sigma, lora_a, dash_vt, t, d, dsigma_part,
    M, K, m_padded, k_padded, parts, tiles_m, stride_ar, stride_ak, stride_vs, stride_vk, scaling,
    RANK: tl.constexpr, DIRECTIONS: tl.constexpr, R_BLOCK: tl.constexpr, BLOCK_M: tl.constexpr, PACK_K: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """T = (G * c)^T (R_BLOCK, m_padded) and partial sums over M of G_s P_s, fp32; programs from tiles_m on pack D.

    T and D (R_BLOCK, k_padded) are in the dtype of x and zero beyond M, K and R: operands of dx and dA that need no mask
    and cause no bank conflicts. Bytes: g_part, P, A, Vt once, T and D once. dsigma_part (tiles_m, R_BLOCK).
    Grid: tiles_m = m_padded / BLOCK_M, and k_padded / PACK_K.
    """
    WIDTH: tl.constexpr = RANK + DIRECTIONS
    pid = tl.program_id(0)
    if pid >= tiles_m:
        ks = tl.cast((pid - tiles_m) * PACK_K, tl.int64) + tl.arange(0, PACK_K)[None, :]
        d_ranks = span(R_BLOCK, WIDE)[:, None]
        dtype: tl.constexpr = d.dtype.element_ty
        tile = stacked(
            lora_a, stride_ar, stride_ak, dash_vt, stride_vs, stride_vk, d_ranks, ks, K, RANK, DIRECTIONS, dtype
        )
        tl.store(d + tl.cast(d_ranks, tl.int64) * k_padded + ks, tile)
        return
    rows, ranks = tl.cast(pid, tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None], tl.arange(0, R_BLOCK)[None, :]
    inside = (rows < M) & (ranks < WIDTH)
    g = tl.zeros((BLOCK_M, R_BLOCK), tl.float32)
    for part in tl.range(0, parts):
        g += tl.load(g_part + (tl.cast(part, tl.int64) * M + rows) * WIDTH + ranks, mask=inside, other=0.0)
    factors = column_factors(dash_sigma, scaling, ranks, RANK, DIRECTIONS)
    tl.store(t + tl.trans(ranks.to(tl.int64) * m_padded + rows), tl.trans(g * factors).to(t.dtype.element_ty))
    if dsigma_part is not None:
        p_tile = tl.load(p + rows * WIDTH + ranks, mask=inside & (ranks >= RANK), other=0.0)
        tl.store(dsigma_part + tl.cast(pid, tl.int64) * R_BLOCK + tl.arange(0, R_BLOCK), tl.sum(g * p_tile, axis=0))


@triton.jit
def _masked_low_rank(
    acc, t, d, seed, m0, k0, m_padded, k_padded, keep_scale, threshold,
    R_BLOCK: tl.constexpr, RANK_STEP: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """mask * (T^T D) * keep_scale of the tile at (m0, k0), in an accumulator that is zero."""
    BLOCK_M: tl.constexpr = acc.shape[0]
    BLOCK_N: tl.constexpr = acc.shape[1]
    t += tl.cast(m0, tl.int64) + tl.arange(0, BLOCK_M)[None, :]
    d += tl.cast(k0, tl.int64) + tl.arange(0, BLOCK_N)[None, :]
    for r0 in tl.range(0, R_BLOCK, RANK_STEP, num_stages=1):
        ranks = r0 + tl.arange(0, RANK_STEP)[:, None]
        t_tile, d_tile = (
            tl.load(t + ranks * tl.cast(m_padded, tl.int64)),
            tl.load(d + ranks * tl.cast(k_padded, tl.int64)),
        )
        acc = tl.dot(tl.trans(t_tile), d_tile, acc, input_precision=PRECISION)
    if DROPOUT:
        acc = tl.where(keep_mask(seed, threshold, m0, k0, DROPOUT, BLOCK_M, BLOCK_N), acc * keep_scale, 0.0)
    return acc


@triton.jit(do_not_specialize=["M", "threshold"])
def dx_gemm(
    dy, w, t, d, seed, dx,
    M, N, K, m_padded, k_padded, stride_ym, stride_yn, stride_wn, stride_wk, keep_scale, threshold,
    R_BLOCK: tl.constexpr, RANK_STEP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr, DROPOUT: tl.constexpr, EVEN_N: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dx (M, K) = mask * (T^T D) * keep_scale + dy W. Tiles are BLOCK_M x BLOCK_N of dx; BLOCK_K runs over N.

    T (R_BLOCK, m_padded), D (R_BLOCK, k_padded) from sum_g, null without adapters. FLOPs: 2 M K (N + R_BLOCK). Bytes: dy,
    W, dx once as far as L2 holds a group of tiles; T and D from L2. The masked low-rank term starts the accumulator:
    nothing of size M x K is stored but dx. In fp32 it comes last: its few large terms would make every one of the many
    small products after them round at their magnitude. N = 0: that term alone. Grid: tiles of M times tiles of K.
    """
    pid_m, pid_k = grouped(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(K, BLOCK_N), GROUP_M)
    m0, k0 = pid_m * BLOCK_M, pid_k * BLOCK_N
    dtype: tl.constexpr = dx.dtype.element_ty
    rows, columns, ns = span(BLOCK_M, WIDE)[:, None], span(BLOCK_N, WIDE)[None, :], span(BLOCK_K, WIDE)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if t is not None and dtype != tl.float32:
        acc = _masked_low_rank(
            acc, t, d, seed, m0, k0, m_padded, k_padded, keep_scale, threshold, R_BLOCK, RANK_STEP, DROPOUT, PRECISION
        )
    out_rows, out_columns = tl.cast(m0, tl.int64) + tl.arange(0, BLOCK_M)[:, None], k0 + tl.arange(0, BLOCK_N)[None, :]
    inside = (out_rows < M) & (out_columns < K)
    dy += tl.cast(m0, tl.int64) * stride_ym
    w += tl.cast(k0, tl.int64) * stride_wk
    for n0 in tl.range(0, N, BLOCK_K):
        dy_tile = operand_tile(dy, n0, rows, ns[None, :], M - m0, N - n0, stride_ym, stride_yn, EVEN_N)
        w_tile = operand_tile(w, n0, columns, ns[:, None], K - k0, N - n0, stride_wk, stride_wn, EVEN_N)
        acc = tl.dot(dy_tile, w_tile, acc, input_precision=PRECISION)
    if t is not None and dtype == tl.float32:
        low = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        acc += _masked_low_rank(
            low, t, d, seed, m0, k0, m_padded, k_padded, keep_scale, threshold, R_BLOCK, RANK_STEP, DROPOUT, PRECISION
        )
    tl.store(dx + out_rows * K + out_columns, acc.to(dtype), mask=inside)


@triton.jit(do_not_specialize=["M", "threshold", "rows_per_split"])
def x_pass(
    x, t, seed, da_part,
    M, K, m_padded, stride_xm, stride_xk, threshold, rows_per_split,
    RANK: tl.constexpr, R_BLOCK: tl.constexpr, RANK_BLOCK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    DROPOUT: tl.constexpr, EVEN_K: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """da_part (splits, r, K) fp32 = T_r^T (mask * x) over rows_per_split rows; T (R_BLOCK, m_padded) begins with scaling G_r.

    FLOPs: 2 M K RANK_BLOCK. Bytes: x once, T once per tile of K from L2, partial sums of 4 r M K / rows_per_split.
    Grid: (tiles of K, splits).
    """
    pid_k, split = tl.program_id(0), tl.program_id(1)
    k0 = pid_k * BLOCK_K
    first, last = split * rows_per_split, tl.minimum(M, (split + 1) * rows_per_split)
    x += tl.cast(k0, tl.int64) * stride_xk
    rows, columns, ranks = span(BLOCK_M, WIDE), span(BLOCK_K, WIDE)[None, :], span(RANK_BLOCK, WIDE)
    acc = tl.zeros((RANK_BLOCK, BLOCK_K), tl.float32)
    for m0 in tl.range(first, last, BLOCK_M):
        start = tl.cast(m0, tl.int64)
        mask = rows[:, None] < last - m0
        if not EVEN_K:
            mask = mask & (columns < K - k0)
        tile = tl.load(x + start * stride_xm + rows[:, None] * stride_xm + columns * stride_xk, mask=mask, other=0.0)
        t_tile = tl.load(
            t + m0 + tl.arange(0, RANK_BLOCK)[:, None] * tl.cast(m_padded, tl.int64) + tl.arange(0, BLOCK_M)[None, :]
        )
        if DROPOUT:
            tile = tl.where(keep_mask(seed, threshold, m0, k0, DROPOUT, BLOCK_M, BLOCK_K), tile, 0.0)
        acc = tl.dot(t_tile, tile, acc, input_precision=PRECISION)
    out = da_part + (tl.cast(split, tl.int64) * RANK + ranks[:, None]) * K + k0 + columns
    tl.store(out, acc, mask=(ranks[:, None] < RANK) & (columns < K - k0))


@triton.jit
def _sum_splits(part, out, tile, splits, RANKS, COLUMNS, stride_rank, stride_column, factor, BLOCK: tl.constexpr):
    """out[i, j] = factor * sum over splits of part (splits, RANKS, COLUMNS), in order; one BLOCK of the flat (i, j)."""
    index = tl.cast(tile, tl.int64) * BLOCK + tl.arange(0, BLOCK)
    size = tl.cast(RANKS, tl.int64) * COLUMNS
    total = tl.zeros((BLOCK,), tl.float32)
    for split in tl.range(0, splits):
        total += tl.load(part + tl.cast(split, tl.int64) * size + index, mask=index < size, other=0.0)
    rank, column = index // COLUMNS, index % COLUMNS
    tl.store(out + rank * stride_rank + column * stride_column, total * factor, mask=index < size)


@triton.jit(do_not_specialize=["x_splits", "y_splits", "sum_tiles", "a_tiles", "b_tiles", "bias_tiles"])
def finish(
    da_part, db_part, dbias_part, dsigma_part, da, db_lora, dbias, dsigma,
    K, N, x_splits, y_splits, sum_tiles, a_tiles, b_tiles, bias_tiles, scale_a, scale_b,
    RANK: tl.constexpr, DIRECTIONS: tl.constexpr, R_BLOCK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The second stage of the sums over M: dA (r, K), dB (N, r), db (N,), d(sigma) (s,), each by its own programs.

    Bytes: every partial sum once. Grid: a_tiles + b_tiles + bias_tiles + (1 where d(sigma) is wanted).
    """
    pid = tl.program_id(0)
    if da is not None and pid < a_tiles:
        _sum_splits(da_part, da, pid, x_splits, RANK, K, K, 1, scale_a, BLOCK)
    pid -= a_tiles
    if db_lora is not None and (pid >= 0) & (pid < b_tiles):
        _sum_splits(db_part, db_lora, pid, y_splits, RANK, N, 1, RANK, scale_b, BLOCK)
    pid -= b_tiles
    if dbias is not None and (pid >= 0) & (pid < bias_tiles):
        _sum_splits(dbias_part, dbias, pid, y_splits, 1, N, N, 1, 1.0, BLOCK)
    pid -= bias_tiles
    if dsigma is not None and pid == 0:
        ranks, tiles = tl.arange(0, R_BLOCK), tl.arange(0, 32)[:, None]
        sums = tl.zeros((32, R_BLOCK), tl.float32)
        for first in tl.range(0, sum_tiles, 32):
            part = dsigma_part + (tl.cast(first, tl.int64) + tiles) * R_BLOCK + ranks[None, :]
            sums += tl.load(part, mask=tiles < sum_tiles - first, other=0.0)
        total = tl.sum(sums, axis=0)
        tl.store(dsigma + ranks - RANK, total, mask=(ranks >= RANK) & (ranks < RANK + DIRECTIONS))
