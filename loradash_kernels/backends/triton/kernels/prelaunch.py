"""Kernels of the pre-launch phase: Gaussian sketch, small singular value decompositions, change rates with their top s.

LU factors, triangular solves, Gram matrices and Cholesky factors are left to the vendor's library. Letters: L matrices in
a batch, N x K each, n triplets, width columns of a sketch, r LoRA rank, s directions.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import philox


@triton.jit
def normals(seed, k0, j0, BLOCK_K: tl.constexpr, BLOCK_J: tl.constexpr):
    """A tile (BLOCK_K, BLOCK_J) of the Gaussian sketch from (k0, j0) on; j0 is a multiple of 4.

    Element (k, j) is the normal quantile of word j % 4 of Philox at counter (j // 4, k, offset), by Giles's polynomials
    (GPU Computing Gems, 2011): relative error 1e-6, a logarithm and a square root.
    """
    key, offset = tl.load(seed), tl.load(seed + 1)
    c0 = (tl.cast(j0 // 4, tl.uint32) + tl.arange(0, BLOCK_J // 4).to(tl.uint32))[None, :]
    c1 = (tl.cast(k0, tl.uint32) + tl.arange(0, BLOCK_K).to(tl.uint32))[:, None]
    c0, c1, c2, c3 = philox(key, c0, c1, offset.to(tl.uint32), (offset >> 32).to(tl.uint32))
    words = tl.reshape(tl.join(tl.join(c0, c2), tl.join(c1, c3)), (BLOCK_K, BLOCK_J))
    x = words.to(tl.int32, bitcast=True).to(tl.float32) * (2.0**-31)
    x = tl.minimum(tl.maximum(x, -0.99999994), 0.99999994)
    w = -tl.log((1.0 - x) * (1.0 + x))
    a = w - 2.5
    near = 2.81022636e-08 * a + 3.43273939e-07
    near = near * a - 3.5233877e-06
    near = near * a - 4.39150654e-06
    near = near * a + 0.00021858087
    near = near * a - 0.00125372503
    near = near * a - 0.00417768164
    near = near * a + 0.246640727
    near = near * a + 1.50140941
    b = tl.sqrt(w) - 3.0
    far = -0.000200214257 * b + 0.000100950558
    far = far * b + 0.00134934322
    far = far * b - 0.00367342844
    far = far * b + 0.00573950773
    far = far * b - 0.0076224613
    far = far * b + 0.00943887047
    far = far * b + 1.00167406
    far = far * b + 2.83297682
    return 1.4142135623730951 * x * tl.where(w < 5.0, near, far)


@triton.jit(do_not_specialize=["width"])
def sketch_product(
    w, seed, y, N, K, width, stride_wl, stride_wn, stride_wk,
    BLOCK_N: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y (L, N, width) = w (L, N, K) Omega, with the Gaussian Omega (K, width) drawn in registers, one for the batch.

    2 N K width FLOPs and a Philox call for 4 elements of Omega and each block of rows; K N + 4 N width bytes of a 16-bit
    w move once for each block of columns. Omega takes the dtype of w: a rounded sketch is as random.
    """
    row, column, matrix = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2).to(tl.int64)
    rows = row * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = column * BLOCK_J + tl.arange(0, BLOCK_J)
    w += matrix * stride_wl
    total = tl.zeros((BLOCK_N, BLOCK_J), tl.float32)
    for k0 in range(0, K, BLOCK_K):
        ks = k0 + tl.arange(0, BLOCK_K).to(tl.int64)
        inside = (rows[:, None] < N) & (ks[None, :] < K)
        tile = tl.load(w + rows[:, None] * stride_wn + ks[None, :] * stride_wk, mask=inside, other=0.0)
        omega = normals(seed, k0, column * BLOCK_J, BLOCK_K, BLOCK_J).to(tile.dtype)
        total = tl.dot(tile, omega, total, input_precision=PRECISION)
    offsets = (matrix * N + rows[:, None]) * width + columns[None, :]
    tl.store(y + offsets, total, mask=(rows[:, None] < N) & (columns[None, :] < width))


@triton.jit
def jacobi_sweeps(
    x, off, rows, length, SWEEPS: tl.constexpr, TOLERANCE: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK: tl.constexpr
):
    """One-sided Jacobi: rotates the rows of every x (L, rows, length) in place until they are orthogonal: x = diag(σ) Vᵀ
    of an SVD, in no order. off (L,) receives the largest cosine between two rows in the last sweep.

    One program per matrix, which stays in its L2; rows // 2 pairs that share no row are rotated at a time, by the circle
    method of round-robin tournaments, with a barrier after each of the steps. 6 rows² length FLOPs and 4 rows² length
    bytes a sweep, five to eight sweeps in float32. High relative accuracy: Demmel and Veselić, SIMAX 1992.
    """
    matrix = tl.program_id(0).to(tl.int64)
    x += matrix * rows * length
    columns = tl.arange(0, BLOCK)[None, :]
    # With an odd number of rows, one sits out at every step.
    steps = rows + rows % 2 - 1
    largest = 4.0
    sweep = 0
    while (sweep < SWEEPS) & (largest > TOLERANCE):
        largest = 0.0
        for step in range(0, steps):
            for first in range(0, (steps + 1) // 2, BLOCK_P):
                pair = first + tl.arange(0, BLOCK_P)
                one = tl.where(pair == 0, steps, (step + pair) % steps)
                other = (step + steps - pair) % steps
                inside = (pair < (steps + 1) // 2) & (one < rows) & (other < rows)
                mask = inside[:, None] & (columns < length)
                at_one = x + one[:, None] * length + columns
                at_other = x + other[:, None] * length + columns
                p = tl.load(at_one, mask=mask, other=0.0)
                q = tl.load(at_other, mask=mask, other=0.0)
                pp, qq, pq = tl.sum(p * p, 1), tl.sum(q * q, 1), tl.sum(p * q, 1)
                scale = tl.sqrt(pp) * tl.sqrt(qq)
                cosine = tl.where(scale > 0, tl.abs(pq) / tl.where(scale > 0, scale, 1.0), 0.0)
                largest = tl.maximum(largest, tl.max(cosine, 0))
                turn = cosine > TOLERANCE / 8
                zeta = (qq - pp) / tl.where(turn, 2 * pq, 1.0)
                sign = tl.where(zeta < 0, -1.0, 1.0)
                # A |zeta| beyond 1e18 would overflow when squared; its tangent is 0 then in any case.
                bounded = tl.minimum(tl.abs(zeta), 1e18)
                tangent = tl.where(turn, sign / (bounded + tl.sqrt(1.0 + bounded * bounded)), 0.0)
                cos = 1.0 / tl.sqrt(1.0 + tangent * tangent)
                sin = cos * tangent
                moved = mask & turn[:, None]
                tl.store(at_one, cos[:, None] * p - sin[:, None] * q, mask=moved)
                tl.store(at_other, sin[:, None] * p + cos[:, None] * q, mask=moved)
            tl.debug_barrier()
        sweep += 1
    tl.store(off + matrix, largest)


@triton.jit
def projected(basis, stride, factor, stride_factor, stride_rank, rows, limit, depth, rank, ROWS: tl.constexpr,
              BLOCK_K: tl.constexpr, RANK: tl.constexpr):  # fmt: skip
    """(ROWS, RANK): the given rows of a basis (limit, depth), whose two strides are `stride`, times factor (depth, rank)."""
    stride_row, stride_k = stride
    ranks = tl.arange(0, RANK)
    total = tl.zeros((ROWS, RANK), tl.float32)
    for k0 in range(0, depth, BLOCK_K):
        ks = k0 + tl.arange(0, BLOCK_K).to(tl.int64)
        inside = (rows[:, None] < limit) & (ks[None, :] < depth)
        tile = tl.load(basis + rows[:, None] * stride_row + ks[None, :] * stride_k, mask=inside, other=0.0)
        at = factor + ks[:, None] * stride_factor + ranks[None, :] * stride_rank
        right = tl.load(at, mask=(ks[:, None] < depth) & (ranks[None, :] < rank), other=0.0)
        total = tl.dot(tile, right, total, input_precision="ieee")
    return total


@triton.jit(do_not_specialize=["n", "s"])
def highest_rates(
    u, v, sigma, b, at, scaling, eps, rate, best, index, arrived, n, N, K, rank, s,
    stride_ul, stride_un, stride_ui, stride_vl, stride_vk, stride_vi, stride_bl, stride_bn, stride_br,
    stride_al, stride_ak, stride_ar,
    ONE_SIDED: tl.constexpr, RANK: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_ALL: tl.constexpr,
):  # fmt: skip
    """rate (L, n) = |scaling · rowwise((Uᵀ B) ⊙ (Vᵀ Aᵀ))| / (σ + eps), and the s highest with their indices (L, s).

    u (L, N, n), v (L, K, n), sigma (L, n), b (L, N, rank), at (L, K, rank); with ONE_SIDED the product is divided by σ (v
    stands for u and at for W Aᵀ: the vectors of the other side are not needed). 2 (N + K) n rank FLOPs, 4 (N + K) n bytes: memory
    bounds it. The last program of a matrix to arrive picks the highest; equal rates go to the lower index.
    """
    block, matrix = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    rows = block * BLOCK_I + tl.arange(0, BLOCK_I)
    left = projected(u + matrix * stride_ul, (stride_ui, stride_un), b + matrix * stride_bl, stride_bn, stride_br,
                     rows, n, N, rank, BLOCK_I, BLOCK_K, RANK)  # fmt: skip
    right = projected(v + matrix * stride_vl, (stride_vi, stride_vk), at + matrix * stride_al, stride_ak, stride_ar,
                      rows, n, K, rank, BLOCK_I, BLOCK_K, RANK)  # fmt: skip
    values = tl.load(sigma + matrix * n + rows, mask=rows < n, other=1.0)
    delta = scaling * tl.sum(left * right, 1)
    if ONE_SIDED:
        delta = delta / tl.maximum(values, 1.1754944e-38)
    tl.store(rate + matrix * n + rows, tl.abs(delta) / (values + eps), mask=rows < n)

    # Every warp has stored its rates before this program counts as arrived.
    tl.debug_barrier()
    if tl.atomic_add(arrived + matrix, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        everything = tl.arange(0, BLOCK_ALL)
        left_over = tl.load(rate + matrix * n + everything, mask=everything < n, other=-1.0, cache_modifier=".cg")
        for place in range(0, s):
            top, where = tl.max(left_over, 0, return_indices=True, return_indices_tie_break_left=True)
            tl.store(best + matrix * s + place, top)
            tl.store(index + matrix * s + place, where.to(tl.int64))
            left_over = tl.where(everything == where, -2.0, left_over)
