"""Unmodified CUTLASS sm_80 tensor-op GEMMs (from the nvidia-cutlass wheel) against torch."""

import pytest
import torch
from ptxsim.cutlass import CutlassGemm, include_dir

pytestmark = pytest.mark.skipif(include_dir() is None, reason="nvidia-cutlass is not installed")


def test_f16_multistage():
    g = CutlassGemm()
    torch.manual_seed(0)
    for m, n, k in ((128, 128, 64), (256, 384, 512), (200, 136, 72)):
        a, b, c, d = (
            torch.randn(m, k).half(),
            torch.randn(n, k).half(),
            torch.randn(m, n).half(),
            torch.zeros(m, n).half(),
        )
        s = g(m, n, k, a, b, c, d, 1.5, 0.5)
        torch.testing.assert_close(
            d.double(), 1.5 * (a.double() @ b.double().T) + 0.5 * c.double(), rtol=1e-3, atol=1e-3
        )
        # CUTLASS's swizzle is conflict-free.
        assert s.smem["by_op"]["ldmatrix"]["conflicts"] == 0 and s.smem["by_op"]["cp_async"]["conflicts"] == 0
        if (m, n, k) == (256, 384, 512):
            assert s.mma_flops == 2 * m * n * k
            # Every CTA reads its A and B panels once, and C: sectors are exactly predictable.
            assert s.gld["sectors"] * 32 == (6 * (128 + 128) * k + m * n) * 2
            assert s.unique_load_bytes == (m * k + n * k + m * n) * 2 and s.unique_store_bytes == m * n * 2


@pytest.mark.parametrize(
    ("element", "dtype", "inst", "tile_k"),
    [("cutlass::bfloat16_t", torch.bfloat16, (16, 8, 16), 32), ("cutlass::tfloat32_t", torch.float32, (16, 8, 8), 16)],
)
def test_other_types_row_major_b(element, dtype, inst, tile_k):
    g = CutlassGemm(
        element=element,
        output="float",
        column_b=False,
        tile=(128, 64, tile_k),
        warp=(64, 32, tile_k),
        inst=inst,
        stages=4,
    )
    torch.manual_seed(0)
    m, n, k = 128, 128, 160
    a, b, c, d = torch.randn(m, k).to(dtype), torch.randn(k, n).to(dtype), torch.zeros(m, n), torch.zeros(m, n)
    g(m, n, k, a, b, c, d, seed=3)
    if dtype is torch.float32:
        a, b = ((x.view(torch.int32) & ~0x1FFF).view(torch.float32) for x in (a, b))
    torch.testing.assert_close(d.double(), a.double() @ b.double(), rtol=1e-5, atol=2e-4)


@pytest.mark.parametrize(
    ("element", "output", "acc", "dtype", "tile", "warp", "inst", "stages"),
    [
        ("int8_t", "int32_t", "int32_t", torch.int8, (128, 128, 64), (64, 64, 64), (16, 8, 32), 3),
        (
            "cutlass::half_t",
            "cutlass::half_t",
            "cutlass::half_t",
            torch.float16,
            (64, 64, 32),
            (32, 32, 32),
            (16, 8, 16),
            3,
        ),
        ("double", "double", "double", torch.float64, (64, 64, 16), (32, 32, 16), (8, 8, 4), 3),
    ],
    ids=["s8", "f16-accumulate", "f64"],
)
def test_other_mma_shapes(element, output, acc, dtype, tile, warp, inst, stages):
    g = CutlassGemm(element, output, acc, True, tile, warp, inst, stages)
    torch.manual_seed(0)
    m, n, k = 128, 128, 128
    if dtype is torch.int8:
        a, b = (torch.randint(-128, 128, (x, k), dtype=dtype) for x in (m, n))
        c, d = torch.zeros(m, n, dtype=torch.int32), torch.zeros(m, n, dtype=torch.int32)
    else:
        a, b = (torch.randn(x, k, dtype=torch.float64).to(dtype) for x in (m, n))
        c, d = torch.zeros(m, n, dtype=dtype), torch.zeros(m, n, dtype=dtype)
    s = g(m, n, k, a, b, c, d)
    want = a.double() @ b.double().T
    tol = {torch.int8: 0, torch.float16: 5e-2, torch.float64: 1e-12}[dtype]
    torch.testing.assert_close(d.double(), want, rtol=tol, atol=tol)
    assert s.mma_flops == 2 * m * n * k
