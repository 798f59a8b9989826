"""Unmodified CUTLASS 3.x sm_90 GEMMs (TMA, mbarrier pipelines, wgmma, TMA epilogues) against torch."""

import pytest
import torch
from ptxsim.cutlass import CutlassSm90Gemm, include_dir

pytestmark = pytest.mark.skipif(include_dir() is None, reason="needs nvidia-cutlass")
CASES = {
    "pingpong, row-major B": ({"schedule": "Pingpong", "column_b": False, "tile": (64, 128, 64)}, torch.float16),
    "cooperative, bf16": (
        {"schedule": "Cooperative", "element": "cutlass::bfloat16_t", "output": "cutlass::bfloat16_t"},
        torch.bfloat16,
    ),
}


@pytest.fixture(scope="module", params=CASES, ids=CASES)
def gemm(request):
    options, dtype = CASES[request.param]
    return CutlassSm90Gemm(**options), options, dtype


@pytest.mark.parametrize("shape", [(256, 256, 256), (200, 136, 328)])
def test_gemm(gemm, shape):
    run, options, dtype = gemm
    (m, n, k), column = shape, options.get("column_b", True)
    torch.manual_seed(1)
    a, b, c = (
        torch.randn(m, k).to(dtype),
        torch.randn(*((n, k) if column else (k, n))).to(dtype),
        torch.randn(m, n).to(dtype),
    )
    want = 1.5 * (a.double() @ (b.double().T if column else b.double())) + 0.5 * c.double()
    for seed in (0, 7):
        d = torch.zeros(m, n).to(dtype)
        s = run(m, n, k, a, b, c, d, 1.5, 0.5, seed=seed)
        torch.testing.assert_close(
            d.double(),
            want,
            rtol=1e-3 if dtype == torch.float16 else 8e-3,
            atol=2e-2 if dtype == torch.float16 else 0.15,
        )
        assert (
            all(op.startswith("wgmma") for op in s.mma_types)
            and s.insts["tma_load"]
            and s.unique_store_bytes == d.numel() * 2
        )
    if shape == (256, 256, 256):
        assert s.mma_flops == 2 * m * n * k and s.gst["bytes"] == d.numel() * 2
