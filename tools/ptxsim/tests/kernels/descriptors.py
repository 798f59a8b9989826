"""Triton kernels for sm_90: tensor descriptors, small types, warp specialisation."""

import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor


@triton.jit
def host_desc_kernel(a, b, c, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    m, n = tl.program_id(0) * BM, tl.program_id(1) * BN
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for k in range(0, K, BK):
        acc = tl.dot(a.load([m, k]), b.load([k, n]), acc)
    c.store([m, n], acc.to(c.dtype))


@triton.jit
def host_desc_bt_kernel(a, b, c, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    m, n = tl.program_id(0) * BM, tl.program_id(1) * BN
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for k in range(0, K, BK):
        acc = tl.dot(a.load([k, m]).T, b.load([n, k]).T, acc)
    c.store([m, n], acc.to(c.dtype))


@triton.jit
def device_desc_kernel(a_ptr, b_ptr, c_ptr, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    m, n = tl.program_id(0) * BM, tl.program_id(1) * BN
    a = tl.make_tensor_descriptor(a_ptr, [M, K], [K, 1], [BM, BK])
    b = tl.make_tensor_descriptor(b_ptr, [K, N], [N, 1], [BK, BN])
    c = tl.make_tensor_descriptor(c_ptr, [M, N], [N, 1], [BM, BN])
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for k in range(0, K, BK):
        acc = tl.dot(a.load([m, k]), b.load([k, n]), acc)
    c.store([m, n], acc.to(tl.float16))


@triton.jit
def batched_desc_kernel(a, b, c, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    z, m, n = tl.program_id(2), tl.program_id(0) * BM, tl.program_id(1) * BN
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for k in range(0, K, BK):
        acc = tl.dot(a.load([z, m, k]).reshape(BM, BK), b.load([z, k, n]).reshape(BK, BN), acc)
    c.store([z, m, n], acc.to(c.dtype).reshape(1, BM, BN))


@triton.jit
def small_type_kernel(
    a_ptr, b_ptr, c_ptr, K: tl.constexpr, OUT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr
):
    om, on, ok = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BK)
    acc = tl.zeros((BM, BN), dtype=OUT)
    for k in range(0, K, BK):
        acc = tl.dot(
            tl.load(a_ptr + om[:, None] * K + (k + ok)[None, :]),
            tl.load(b_ptr + on[None, :] * K + (k + ok)[:, None]),
            acc,
            out_dtype=OUT,
        )
    tl.store(c_ptr + om[:, None] * BN + on[None, :], acc.to(tl.float32))


@triton.jit
def warp_specialised_kernel(a, b, c, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    m, n = tl.program_id(0) * BM, tl.program_id(1) * BN
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for k in tl.range(0, K, BK, warp_specialize=True):
        acc = tl.dot(a.load([m, k]), b.load([k, n]), acc)
    c.store([m, n], acc.to(c.dtype))


@triton.jit
def copy_kernel(x, y, z, B0: tl.constexpr, B1: tl.constexpr):
    at = [tl.program_id(0) * B0, tl.program_id(1) * B1]
    v = x.load(at)
    y.store(at, v)
    z.atomic_add(at, v)


def desc(t, block):
    return TensorDescriptor(t, list(t.shape), list(t.stride()), list(block))
