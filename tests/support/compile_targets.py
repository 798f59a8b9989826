"""Compiles every kernel of every tile for one architecture and prints a JSON line each. Run in a process of its own:
Triton's JIT remembers its target.

    python -m tests.support.compile_targets sm_80
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterator

import torch

from loradash_kernels.backends.triton import prelaunch as prelaunch_kernels
from loradash_kernels.backends.triton import tiles
from loradash_kernels.backends.triton.plan.backward import plan_backward
from loradash_kernels.backends.triton.plan.forward import plan_forward
from loradash_kernels.backends.triton.problem import KernelLaunch, Problem
from loradash_kernels.backends.triton.strategies import Strategy
from loradash_kernels.calls import BackwardCall, ForwardCall

from .triton_emulation import compile_launch, resources

M, K, N = 8192, 4096, 4096


def launches(
    target: str,
    dtype: torch.dtype,
    strategy: Strategy,
    r: int = 16,
    s: int = 8,
    k: int = K,
    n: int = N,
    m: int = M,
    backward: bool = True,
) -> Iterator[KernelLaunch]:
    """The launches of a forward and a backward call with dropout, bias and fp32 adapters: the launches that are kernels of ours."""

    def empty(*shape: int, of: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(*shape, dtype=of)

    x, weight, y = empty(m, k, of=dtype), empty(n, k, of=dtype), empty(m, n, of=dtype)
    adapters = (empty(r, k), empty(n, r), empty(n, s), empty(s, k), empty(s))
    options, p = (torch.zeros(2, dtype=torch.int64), 2.0, 3277), empty(m, r + s)
    grads = (empty(m, k, of=dtype), empty(r, k), empty(n, r), empty(s), empty(n))
    one = ForwardCall(x, weight, empty(n, of=dtype), *adapters, *options, None, y, p)
    two = BackwardCall(y, x, weight, *adapters, p, *options, *grads)
    found = plan_forward(Problem(one, tiles.TARGETS[target]), strategy)
    if backward:
        found += plan_backward(Problem(two, tiles.TARGETS[target]), strategy)
    return (launch for launch in found if isinstance(launch, KernelLaunch))


def everything(target: str) -> Iterator[tuple[str, KernelLaunch]]:
    """Every tile at r 16, s 8; the largest with wider ranks; ragged K and N; bf16, and fp16 and fp32 with the first; the
    low-rank kernels on top of a library's product; the down-projection of few rows."""
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float16, "fp16"), (torch.float32, "fp32")):
        table = tiles.gemm_table(tiles.TARGETS[target], dtype.itemsize)
        for index, tile in enumerate(table if name == "bf16" else table[:1]):
            for launch in launches(target, dtype, Strategy("fused", tile)):
                if index == 0 or launch.kernel.__name__ in ("extended_gemm", "dx_gemm"):
                    yield name, launch
            if tiles.TARGETS[target].descriptors and name == "bf16":
                for launch in launches(target, dtype, Strategy("descriptors", tile)):
                    if launch.kernel.__name__.startswith("descriptor"):
                        yield name, launch
        if name == "fp16":
            continue
        cdna = tiles.TARGETS[target].warp_size == 64
        for tile in () if cdna else tiles.one_launch_table(tiles.TARGETS[target], dtype.itemsize):
            for launch in launches(target, dtype, Strategy("one_launch", tile), backward=False):
                yield name, launch
        for launch in launches(target, dtype, Strategy("library")):
            if launch.kernel.__name__ in ("extended_gemm", "dx_gemm"):
                yield name, launch
        for m in (64, 4096):
            yield name, next(launches(target, dtype, Strategy(), m=m))
        for r, s, k, n in ((56, 8, K, N), (120, 8, K, N), (248, 8, K, N), (16, 8, K - 3, N - 3)):
            for launch in launches(target, dtype, Strategy(), r, s, k, n):
                yield name, launch


def prelaunch(target: str) -> Iterator[tuple[str, KernelLaunch]]:
    """Sketches, Jacobi SVDs at the widths of the tails of n = 384 to 8192, change rates of as many triplets and ranks."""
    empty = torch.empty
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        for width in (16, 178):
            w, seed, y = empty(2, N, K, dtype=dtype), torch.zeros(2, dtype=torch.int64), empty(2, N, width)
            yield name, prelaunch_kernels.plan_sketch(w, seed, y)
            if name == "fp32" and target in ("sm_80", "sm_86", "sm_89", "sm_90"):
                yield name, prelaunch_kernels.plan_sketch(w, seed, y, "tf32x3")
    for width in (40, 178, 690):
        yield "fp32", prelaunch_kernels.plan_jacobi(empty(2, width, width), empty(2))
    for n in (349, prelaunch_kernels.MAX_TRIPLETS):
        for rank in (8, prelaunch_kernels.MAX_RANK):
            out = empty(2, n), empty(2, 8), empty(2, 8, dtype=torch.int64)
            basis, factors = (empty(2, N, n), empty(2, K, n), empty(2, n)), (empty(2, N, rank), empty(2, K, rank))
            yield "fp32", prelaunch_kernels.plan_rates(*basis, *factors, 2.0, 1e-6, False, out)


def main(target: str) -> None:
    seen = set()
    for dtype, launch in itertools.chain(everything(target), prelaunch(target)):
        compiled = compile_launch(launch, target)
        if compiled.hash in seen:
            continue
        seen.add(compiled.hash)
        found = resources(compiled, tiles.TARGETS[target])
        constants = {k: v for k, v in launch.constants.items() if k.startswith(("BLOCK", "R_BLOCK", "EVEN"))}
        tile = {**constants, "warps": launch.num_warps, "stages": launch.num_stages}
        line = {
            "kernel": launch.kernel.__name__,
            "dtype": dtype,
            "tile": tile,
            "registers": found.registers,
            "spilled": found.spilled,
            "shared": found.shared,
            "matrix": found.matrix_instructions,
            "warp_matrix": found.warp_instructions,
        }
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
