"""Triton kernels that load through pointers: what sm_80 and sm_90 both run."""

import triton
import triton.language as tl


@triton.jit
def add_kernel(x, y, o, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m = i < n
    tl.store(o + i, tl.load(x + i, mask=m) + tl.load(y + i, mask=m), mask=m)


@triton.jit
def softmax_kernel(x, o, stride, n, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    v = tl.load(x + row * stride + i, mask=i < n, other=-float("inf")).to(tl.float32)
    e = tl.exp(v - tl.max(v, axis=0))
    tl.store(o + row * stride + i, e / tl.sum(e, axis=0), mask=i < n)


@triton.jit
def dropout_kernel(x, o, n, p, seed, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m = i < n
    keep = tl.rand(seed, i) > p
    tl.store(o + i, tl.where(keep, tl.load(x + i, mask=m) / (1 - p), 0.0), mask=m)


@triton.jit
def atomic_kernel(x, total, hist, biggest, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m = i < n
    v = tl.load(x + i, mask=m, other=0)
    tl.atomic_add(total, tl.sum(v.to(tl.float32)))
    tl.atomic_add(hist + (v & 15), tl.full((BLOCK,), 1, tl.int32), mask=m)
    tl.atomic_max(biggest, tl.max(v))


@triton.jit
def matmul_kernel(a_ptr, b_ptr, c_ptr, M, N, K, sam, sbk, scm, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    pm, pn = tl.program_id(0), tl.program_id(1)
    om, on, ok = pm * BM + tl.arange(0, BM), pn * BN + tl.arange(0, BN), tl.arange(0, BK)
    a = a_ptr + om[:, None] * sam + ok[None, :]
    b = b_ptr + ok[:, None] * sbk + on[None, :]
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for k in range(0, K, BK):
        x = tl.load(a, mask=(om[:, None] < M) & (ok[None, :] < K - k), other=0.0)
        y = tl.load(b, mask=(ok[:, None] < K - k) & (on[None, :] < N), other=0.0)
        acc = tl.dot(x, y, acc)
        a += BK
        b += BK * sbk
    tl.store(
        c_ptr + om[:, None] * scm + on[None, :],
        acc.to(c_ptr.dtype.element_ty),
        mask=(om[:, None] < M) & (on[None, :] < N),
    )


@triton.jit
def dropout_matmul_kernel(a_ptr, b_ptr, c_ptr, M, N, K, p, seed, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    pm, pn = tl.program_id(0), tl.program_id(1)
    om, on, ok = pm * BM + tl.arange(0, BM), pn * BN + tl.arange(0, BN), tl.arange(0, BK)
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for k in range(0, K, BK):
        at = om[:, None] * K + (k + ok)[None, :]
        x = tl.load(a_ptr + at, mask=(om[:, None] < M) & ((k + ok)[None, :] < K), other=0.0)
        x = tl.where(tl.rand(seed, at) > p, x / (1 - p), 0.0).to(tl.float16)
        y = tl.load(
            b_ptr + (k + ok)[:, None] * N + on[None, :], mask=((k + ok)[:, None] < K) & (on[None, :] < N), other=0.0
        )
        acc = tl.dot(x, y, acc)
    tl.store(c_ptr + om[:, None] * N + on[None, :], acc, mask=(om[:, None] < M) & (on[None, :] < N))


@triton.jit
def split_k_kernel(
    a_ptr,
    b_ptr,
    part,
    flags,
    c_ptr,
    M,
    N,
    K,
    SPLIT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    CAS: tl.constexpr,
    FLAG: tl.constexpr,
    SEM: tl.constexpr,
):
    """Persistent: each program takes tiles in turn; split s adds its partial product to what split s - 1 stored, after waiting for its flag."""
    tiles_n = tl.cdiv(N, BN)
    for t in range(tl.program_id(0), tl.cdiv(M, BM) * tiles_n * SPLIT, tl.num_programs(0)):
        s, tile = t % SPLIT, t // SPLIT
        om, on, ok = tile // tiles_n * BM + tl.arange(0, BM), tile % tiles_n * BN + tl.arange(0, BN), tl.arange(0, BK)
        acc = tl.zeros((BM, BN), dtype=tl.float32)
        for k in range(s * (K // SPLIT), (s + 1) * (K // SPLIT), BK):
            x = tl.load(a_ptr + om[:, None] * K + (k + ok)[None, :])
            y = tl.load(b_ptr + (k + ok)[:, None] * N + on[None, :])
            acc = tl.dot(x, y, acc)
        at = om[:, None] * N + on[None, :]
        if s > 0:
            if FLAG:
                if CAS:
                    while tl.atomic_cas(flags + tile, s, s, sem="acquire") != s:
                        pass
                else:
                    while tl.atomic_add(flags + tile, 0, sem="acquire") != s:
                        pass
            acc += tl.load(part + at, cache_modifier=".cg")
        if s == SPLIT - 1:
            tl.store(c_ptr + at, acc.to(tl.float16))
        else:
            tl.store(part + at, acc)
            tl.debug_barrier()
            tl.atomic_add(flags + tile, 1, sem=SEM)


@triton.jit
def reversed_flag_kernel(flags):
    p = tl.program_id(0)
    if p + 1 < tl.num_programs(0):
        while tl.atomic_add(flags + p + 1, 0, sem="acquire") == 0:
            pass
    tl.atomic_xchg(flags + p, 1, sem="release")


@triton.jit
def attention_kernel(q, k, v, o, n, scale, N: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    i, j, d = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, D)
    qs = tl.load(q + i[:, None] * D + d[None, :])
    m, s, acc = tl.full((BM,), -float("inf"), tl.float32), tl.zeros((BM,), tl.float32), tl.zeros((BM, D), tl.float32)
    for start in range(0, N, BN):
        kk = tl.load(k + (start + j)[None, :] * D + d[:, None])
        x = tl.dot(qs, kk) * scale
        x = tl.where(i[:, None] >= (start + j)[None, :], x, -float("inf"))
        mn = tl.maximum(m, tl.max(x, 1))
        p, r = tl.exp2(x - mn[:, None]), tl.exp2(m - mn)
        vv = tl.load(v + (start + j)[:, None] * D + d[None, :])
        acc = tl.dot(p.to(tl.float16), vv, acc * r[:, None])
        s, m = s * r + tl.sum(p, 1), mn
    tl.store(o + i[:, None] * D + d[None, :], (acc / s[:, None]).to(tl.float16))
