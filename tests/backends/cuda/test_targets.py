"""Every CUDA kernel assembled for every card it ships for: no spills, registers, and shared memory as the plan says."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support import cuda_emulation as emulation

from loradash_kernels.backends import extension
from loradash_kernels.testing import make_case

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


def shared_bytes(card):
    """What each kernel of two calls takes as planned, apart and in one launch."""
    case = make_case(300, 136, 400, 16, 8, torch.bfloat16, adapter_dtype=torch.float32, bias=False)
    found, out = {}, emulation.outputs(case)
    for tile in ("128x128", "one_launch_128x128"):
        for pass_name in ("forward", "backward"):
            launches, _ = emulation.plan(case, out, pass_name, None, None, card, tile)
            found |= {name: shared for name, _, _, shared, _ in launches}
    return found


@pytest.mark.parametrize(
    ("architecture", "processor", "programs"),
    [
        ("sm_80", 164 * 1024, (2, 2, 2, 1, 2)),
        ("sm_86", 100 * 1024, (2, 1, 1, 1, 1)),
        ("sm_89", 100 * 1024, (2, 1, 1, 1, 1)),
    ],
)
def test_occupancy(assembled, architecture, processor, programs):
    """Programs that one processor holds, by registers and by shared memory (1 KB of each is the system's)."""
    planned = shared_bytes(emulation.CARDS["sm_80" if architecture == "sm_80" else "sm_86"])
    names = ("gemm_rows_bf16_128x128", "x_16_bf16", "down_32_bf16", "dy_32_24_bf16", "one_launch_128x128_rows_bf16")
    for name, wanted in zip(names, programs, strict=True):
        registers = -(-assembled[architecture][name]["registers"] // 8) * 8
        held = min(REGISTERS // (registers * 128), processor // (planned[name] + 1024))
        assert held >= wanted, (name, registers, planned[name])


@pytest.mark.parametrize(("architecture", "card"), emulation.CARDS.items())
def test_tiles_fit_the_card(architecture, card):
    names = extension.compiled().cuda_tiles(card)
    assert "128x128" in names and "64x64" in names and names == sorted(set(names), key=names.index)
    assert "128x256" not in extension.compiled().cuda_tiles((card[0], 64 * 1024))
