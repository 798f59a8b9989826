"""Every CUDA kernel assembled for every card it ships for: no spills, registers, and shared memory as the plan says."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import cuda_emulation as emulation
import pytest

from loradash_kernels import _extension

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(emulation.missing_tools() is not None, reason=str(emulation.missing_tools())),
]
ARCHITECTURES = ("sm_80", "sm_86", "sm_89")
REGISTERS, LIMIT = 65536, 255


@pytest.fixture(scope="module")
def assembled():
    """Resources by architecture and kernel; two assemblies at a time."""
    import ptxsim

    jobs = [(source, architecture) for architecture in ARCHITECTURES for source in emulation.SOURCES]
    with ThreadPoolExecutor(2) as pool:
        found = pool.map(lambda job: ptxsim.resources(emulation.ptx(*job)), jobs)
    by_card = {architecture: {} for architecture in ARCHITECTURES}
    for (_, architecture), kernels in zip(jobs, found, strict=True):
        by_card[architecture] |= kernels
    return by_card


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_spills(assembled, architecture):
    kernels = assembled[architecture]
    assert len(kernels) > 60
    bad = {name: r for name, r in kernels.items() if r["spill_stores"] or r["spill_loads"] or r["stack"]}
    assert not bad
    assert all(r["registers"] <= LIMIT for r in kernels.values())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_occupancy(assembled, architecture):
    """Programs that fit one processor by registers: two of the 128 x 128 product, three of the passes over x."""
    wanted = {"gemm_rows_bf16_128x128": 2, "gemm_columns_bf16_128x128": 2, "gemm_rows_bf16_128x256": 1, "x_16_bf16": 3,
              "down_32_bf16": 3, "dy_32_24_bf16": 2, "one_launch_128x128_rows_bf16": 2}  # fmt: skip
    for name, programs in wanted.items():
        threads = 256 if name.endswith("256") else 128
        registers = -(-assembled[architecture][name]["registers"] // 8) * 8
        assert REGISTERS // (registers * threads) >= programs, (name, registers)


@pytest.mark.parametrize(("architecture", "card"), emulation.CARDS.items())
def test_tiles_fit_the_card(architecture, card):
    names = _extension.compiled().gpu_tiles(card)
    assert "128x128" in names and "64x64" in names and names == sorted(set(names), key=names.index)
    assert "128x256" not in _extension.compiled().gpu_tiles((card[0], 64 * 1024))
