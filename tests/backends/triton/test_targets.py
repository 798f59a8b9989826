"""Every Triton kernel with every tile, cross-compiled: no spills, within the card's shared memory, on matrix units.

Spills are the compiler's. The tiles were chosen for the Triton of HELD, with which none spills. For other versions, what was seen
to spill stands in SPILLS, and where nobody has looked, a kernel may spill what the worst was seen to. A failure names the
version, the kernel and the tile.
"""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from support import triton_emulation as emulation

from loradash_kernels.backends.triton.strategies import Strategy
from loradash_kernels.backends.triton.target import triton_version
from loradash_kernels.backends.triton.tiles import TARGETS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(emulation.missing_tools() is not None, reason=str(emulation.missing_tools())),
]

TESTS = Path(__file__).parents[2]
# Tiles of the products are high enough for the target's own matrix instruction.
PRODUCTS = ("extended_gemm", "dx_gemm", "descriptor_forward", "descriptor_dx")
PASSES = ("down_projection", "dy_pass", "x_pass")
PRELAUNCH = ("sketch_product", "jacobi_sweeps", "highest_rates")
# These have no products of matrices, or only full fp32 ones.
SUMS = ("sum_g", "add_parts", "finish", "jacobi_sweeps", "highest_rates")
HELD = (3, 8)
# The architectures that were looked at with other versions; and there the kernel, its tile (rows, columns, depth; a block) and the
# bytes that it spills. A few bytes cost a few stores and loads a tile, and no bit of the result.
SEEN = {(3, 5): ("sm_90",), (3, 6): ("sm_80", "sm_86", "sm_90")}
SPILLS = {
    ((3, 5), "sm_90", "descriptor_dx", (128, 256, 64)): 24,
    ((3, 5), "sm_90", "one_launch_forward", (32, 32, 16)): 8,
    ((3, 6), "sm_80", "dx_gemm", (64, 128, 32)): 8,
    ((3, 6), "sm_80", "jacobi_sweeps", (1024,)): 8,
    ((3, 6), "sm_86", "dx_gemm", (64, 128, 32)): 8,
    ((3, 6), "sm_86", "jacobi_sweeps", (1024,)): 8,
}
# Where nobody has looked: the most that was seen is 88 (Triton 3.4, sm_90, descriptor_dx of 128 x 256 x 64).
UNSEEN = 96


def tile_of(kernel: dict[str, Any]) -> tuple[int, ...]:
    return tuple(kernel["tile"][name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "BLOCK") if name in kernel["tile"])


def allowed(version: tuple[int, int], target: str, kernel: dict[str, Any]) -> int:
    """The bytes that this kernel may spill."""
    if version == HELD or target in SEEN.get(version, ()):
        return SPILLS.get((version, target, kernel["kernel"], tile_of(kernel)), 0)
    return UNSEEN


def dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))


@pytest.fixture(scope="module")
def compilations():
    """One process per architecture, two at a time: Triton's JIT remembers its target."""

    def compile_all(target: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "support.compile_targets", target]
        return subprocess.run(command, capture_output=True, text=True, cwd=TESTS)

    with ThreadPoolExecutor(2) as pool:
        yield {target: pool.submit(compile_all, target) for target in TARGETS}


@pytest.mark.parametrize("target", TARGETS)
def test_target(compilations, target):
    card = TARGETS[target]
    if triton_version() < card.triton:
        pytest.skip(
            f"Triton {dotted(triton_version())} does not compile for {target}: {dotted(card.triton)} is the first that does"
        )
    done = compilations[target].result()
    assert done.returncode == 0, done.stderr[-3000:]
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    names = {kernel["kernel"] for kernel in kernels}
    wanted = {*(PRODUCTS if card.descriptors else PRODUCTS[:2]), *PASSES, "sum_g", "add_parts", "finish", *PRELAUNCH}
    assert names == wanted | ({"one_launch_forward"} if card.warp_size == 32 else set())
    wrong = [
        k for k in kernels if k["spilled"] > allowed(triton_version(), target, k) or k["shared"] > card.shared_limit
    ]
    assert wrong == [], f"with Triton {dotted(triton_version())}"
    for kernel in kernels:
        # Full fp32 products run on the vector units.
        if kernel["dtype"] == "fp32" or kernel["kernel"] in SUMS:
            continue
        found = kernel["matrix"] + (0 if kernel["kernel"] in PRODUCTS else kernel["warp_matrix"])
        assert found > 0, kernel


def test_spills_that_are_allowed():
    """None with the version that the tiles were chosen for, and no more than was seen elsewhere."""
    kernel = {"kernel": "dx_gemm", "tile": {"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 32}}
    assert allowed(HELD, "sm_80", kernel) == 0
    assert allowed((3, 6), "sm_80", kernel) == 8 and allowed((3, 6), "sm_90", kernel) == 0
    assert allowed((9, 9), "sm_80", kernel) == UNSEEN > max(SPILLS.values())
    assert all(version != HELD and target in SEEN[version] for version, target, *_ in SPILLS)


def test_no_copies_ahead_without_the_fence(monkeypatch):
    """Triton before 3.7 leaves out the fence between cp.async and wgmma: one stage, but for fp32 products and descriptors."""
    from support.compile_targets import launches

    def stages(version, dtype, kind):
        monkeypatch.setattr("loradash_kernels.backends.triton.target.triton_version", lambda: version)
        return {launch.kernel.__name__: launch.num_stages for launch in launches("sm_90", dtype, Strategy(kind))}

    without, fenced = (stages(version, torch.bfloat16, "fused") for version in ((3, 6), (3, 7)))
    assert fenced["extended_gemm"] > 1 and fenced["dy_pass"] > 1
    assert {without[name] for name in (*PRODUCTS[:2], *PASSES)} == {1}
    assert stages((3, 6), torch.float32, "fused")["extended_gemm"] > 1
    assert stages((3, 6), torch.bfloat16, "descriptors")["descriptor_forward"] > 1
