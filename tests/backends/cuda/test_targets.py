"""Every CUDA kernel assembled for every card it ships for: no spills, registers, and shared memory as the plan says."""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import pytest
import torch
from support import cuda_emulation as emulation

from loradash_kernels.testing import make_case

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(emulation.missing_tools() is not None, reason=str(emulation.missing_tools())),
]
REGISTERS, LIMIT = 65536, 255


class Card(NamedTuple):
    """Whose PTX is assembled for it, and the bytes of shared memory that a processor has and that a block may take."""

    ptx: str
    processor: int
    block: int


# Builds carry code for the first of each generation, which the others run, or its PTX, which they compile. nvcc's PTX is
# the same text from sm_80 to sm_89.
CARDS = {
    "sm_80": Card("sm_80", 164 * 1024, 163 * 1024),
    "sm_86": Card("sm_80", 100 * 1024, 99 * 1024),
    "sm_87": Card("sm_80", 164 * 1024, 163 * 1024),
    "sm_89": Card("sm_80", 100 * 1024, 99 * 1024),
    "sm_90": Card("sm_90", 228 * 1024, 227 * 1024),
    "sm_100": Card("sm_100", 228 * 1024, 227 * 1024),
    "sm_103": Card("sm_100", 228 * 1024, 227 * 1024),
    "sm_110": Card("sm_100", 228 * 1024, 227 * 1024),
    "sm_120": Card("sm_120", 100 * 1024, 99 * 1024),
    "sm_121": Card("sm_120", 100 * 1024, 99 * 1024),
}


@functools.cache
def assembled(architecture):
    """Resources by kernel; both sources at a time."""
    import ptxsim

    if architecture not in emulation.known_architectures():
        pytest.skip(f"this toolkit knows no {architecture}")

    def resources(source):
        return ptxsim.resources(emulation.ptx(source, CARDS[architecture].ptx), architecture)

    with ThreadPoolExecutor(len(emulation.SOURCES)) as pool:
        return {name: used for found in pool.map(resources, emulation.SOURCES) for name, used in found.items()}


@pytest.mark.parametrize("architecture", CARDS)
def test_no_spills(architecture):
    kernels = assembled(architecture)
    assert len(kernels) > 60
    bad = {name: r for name, r in kernels.items() if r["spill_stores"] or r["spill_loads"] or r["stack"]}
    assert not bad
    assert all(r["registers"] <= LIMIT for r in kernels.values())


@pytest.mark.parametrize("source", emulation.SOURCES)
def test_reads_what_other_programs_wrote(source):
    """Loads through the read-only cache take no part in PTX's causality order, on which kernels rely."""
    assert "ld.global.nc" not in emulation.ptx(source, "sm_80")


def shared_bytes(card):
    """What each kernel of several calls takes as planned: apart, in one launch, and before a library's product."""
    case = make_case(300, 136, 400, 16, 8, torch.bfloat16, adapter_dtype=torch.float32, bias=False)
    found, out = {}, emulation.outputs(case)
    for tile, weight in (("128x128", True), ("one_launch_128x128", True), ("", False)):
        for pass_name in ("forward", "backward"):
            launches, _ = emulation.plan(case, out, pass_name, None, None, card, tile, weight)
            found |= {name: shared for name, _, _, shared, _ in launches}
    return found


RESIDENT = {
    "gemm_rows_bf16_128x128": (2, 2),
    "x_16_bf16": (2, 1),
    "down_32_bf16": (2, 1),
    "dy_32_24_bf16": (1, 1),
    "one_launch_128x128_rows_bf16": (2, 1),
    "gemm_rows_bf16_64x128_shallow": (3, 3),
    "gemm_columns_bf16_64x128_shallow": (3, 3),
}


@pytest.mark.parametrize("architecture", CARDS)
def test_occupancy(architecture):
    """Programs that one processor holds, by registers and by shared memory (1 KB of each is the system's): with 164 KB or
    more, and with 100 KB."""
    card, kernels = CARDS[architecture], assembled(architecture)
    planned = shared_bytes((100, card.block))
    for name, wanted in RESIDENT.items():
        registers = -(-kernels[name]["registers"] // 8) * 8
        held = min(REGISTERS // (registers * 128), card.processor // (planned[name] + 1024))
        assert held >= wanted[card.processor <= 100 * 1024], (name, registers, planned[name])
