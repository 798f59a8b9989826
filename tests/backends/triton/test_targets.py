"""Every Triton kernel with every tile, cross-compiled: no spills, within the card's shared memory, on matrix units."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support import triton_emulation as emulation

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
# These take another target's tiles: only the largest ones are compiled.
BRIEF = ("sm_103", "sm_110", "sm_120", "sm_121")


@pytest.fixture(scope="module")
def compilations():
    """One process per architecture, two at a time: Triton's JIT remembers its target."""

    def compile_all(target: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "support.compile_targets", target, *(["brief"] if target in BRIEF else [])]
        return subprocess.run(command, capture_output=True, text=True, cwd=TESTS)

    with ThreadPoolExecutor(2) as pool:
        yield {target: pool.submit(compile_all, target) for target in TARGETS}


@pytest.mark.parametrize("target", TARGETS)
def test_target(compilations, target):
    done = compilations[target].result()
    assert done.returncode == 0, done.stderr[-3000:]
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    names = {kernel["kernel"] for kernel in kernels}
    wanted = {*(PRODUCTS if TARGETS[target].asynchronous else PRODUCTS[:2]), *PASSES, "sum_g", "add_parts", "finish"}
    wanted |= {"one_launch_forward"} if TARGETS[target].warp_size == 32 else set()
    assert names == (wanted if target in BRIEF else {*wanted, *PRELAUNCH})
    assert [kernel for kernel in kernels if kernel["problems"]] == []
    for kernel in kernels:
        # Full fp32 products run on the vector units.
        if kernel["dtype"] == "fp32" or kernel["kernel"] in SUMS:
            continue
        found = kernel["matrix"] + (0 if kernel["kernel"] in PRODUCTS else kernel["warp_matrix"])
        assert found > 0, kernel
