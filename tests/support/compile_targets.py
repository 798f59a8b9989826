"""Compiles every kernel of every tile for one architecture and prints a JSON line each. Run in a process of its own:
Triton's JIT remembers its target.

    python -m tests.support.compile_targets sm_80
    python -m tests.support.compile_targets sm_120 brief     # of every kernel the largest tile only
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterator

import torch

from loradash_kernels.backends.triton import prelaunch as spectral
from loradash_kernels.backends.triton import tiles
from loradash_kernels.backends.triton.plan import plan_backward, plan_forward
from loradash_kernels.backends.triton.problem import Launch, Problem, Strategy

from .triton_emulation import compile_launch, resources

M, K, N = 8192, 4096, 4096


def problem(target: str, r: int, s: int, dtype: torch.dtype, k: int = K, n: int = N, m: int = M) -> Problem:
    def empty(*shape: int, of: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(*shape, dtype=of)

    f32 = torch.float32
    adapters = (empty(r, k, of=f32), empty(n, r, of=f32), empty(n, s, of=f32), empty(s, k, of=f32), empty(s, of=f32))
    seed = torch.zeros(2, dtype=torch.int64)
    return Problem(empty(m, k), empty(n, k), *adapters, seed, 2.0, 3277, tiles.TARGETS[target])


def launches(q: Problem, strategy: Strategy, backward: bool = True) -> Iterator[Launch]:
    dtype, f32 = q.x.dtype, torch.float32
    y, p, bias = torch.empty(q.m, q.n, dtype=dtype), torch.empty(q.m, q.width), torch.empty(q.n, dtype=dtype)
    forward = plan_forward(q, bias, None, y, p, strategy)
    yield from (launch for launch in forward if isinstance(launch, Launch))
    if backward:
        shapes = ((q.rank, q.k), (q.n, q.rank), (q.directions,), (q.n,))
        grads = [torch.empty(shape, dtype=f32) for shape in shapes]
        found = plan_backward(q, y, p, torch.empty(q.m, q.k, dtype=dtype), *grads, strategy)
        yield from (launch for launch in found if isinstance(launch, Launch))


def everything(target: str) -> Iterator[tuple[str, Launch]]:
    """Every tile at r 16, s 8; the largest with wider ranks; ragged K and N; bf16, and fp16 and fp32 with the first; the
    low-rank kernels on top of a library's product; the down-projection of few rows."""
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float16, "fp16"), (torch.float32, "fp32")):
        table = tiles.gemm_table(tiles.TARGETS[target], dtype.itemsize)
        for index, tile in enumerate(table if name == "bf16" else table[:1]):
            for launch in launches(problem(target, 16, 8, dtype), Strategy("fused", tile)):
                if index == 0 or launch.kernel.__name__ in ("extended_gemm", "dx_gemm"):
                    yield name, launch
            if tiles.TARGETS[target].asynchronous and name == "bf16":
                for launch in launches(problem(target, 16, 8, dtype), Strategy("descriptors", tile)):
                    if launch.kernel.__name__.startswith("descriptor"):
                        yield name, launch
        if name == "fp16":
            continue
        cdna = tiles.TARGETS[target].warp_size == 64
        for tile in () if cdna else tiles.one_launch_table(tiles.TARGETS[target], dtype.itemsize):
            for launch in launches(problem(target, 16, 8, dtype), Strategy("one_launch", tile), backward=False):
                yield name, launch
        for launch in launches(problem(target, 16, 8, dtype), Strategy("library")):
            if launch.kernel.__name__ in ("extended_gemm", "dx_gemm"):
                yield name, launch
        for m in (64, 4096):
            yield name, next(launches(problem(target, 16, 8, dtype, m=m), Strategy()))
        for r, s, k, n in ((56, 8, K, N), (120, 8, K, N), (248, 8, K, N), (16, 8, K - 3, N - 3)):
            for launch in launches(problem(target, r, s, dtype, k, n), Strategy()):
                yield name, launch


def largest(target: str) -> Iterator[tuple[str, Launch]]:
    """The largest tile of every kernel of the operator at r 16, s 8, bf16 and fp32; and the widest ranks."""
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        q, wide = problem(target, 16, 8, dtype), problem(target, 248, 8, dtype)
        tile = tiles.gemm_table(q.target, dtype.itemsize)[0]
        yield from ((name, launch) for launch in launches(q, Strategy("fused", tile)))
        if q.target.asynchronous and name == "bf16":
            found = launches(q, Strategy("descriptors", tile))
            yield from ((name, launch) for launch in found if launch.kernel.__name__.startswith("descriptor"))
        tile = tiles.one_launch_table(q.target, dtype.itemsize)[0]
        yield from ((name, launch) for launch in launches(q, Strategy("one_launch", tile), backward=False))
        yield from ((name, launch) for launch in launches(wide, Strategy()))


def prelaunch(target: str) -> Iterator[tuple[str, Launch]]:
    """Sketches, Jacobi SVDs at the widths of the tails of n = 384 to 8192, change rates of as many triplets and ranks."""
    empty = torch.empty
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        for width in (16, 178):
            w, seed, y = empty(2, N, K, dtype=dtype), torch.zeros(2, dtype=torch.int64), empty(2, N, width)
            yield name, spectral.plan_sketch(w, seed, y)
            if name == "fp32" and target in ("sm_80", "sm_86", "sm_89", "sm_90"):
                yield name, spectral.plan_sketch(w, seed, y, "tf32x3")
    for width in (40, 178, 690):
        yield "fp32", spectral.plan_jacobi(empty(2, width, width), empty(2))
    for n in (349, spectral.MAX_TRIPLETS):
        for rank in (8, spectral.MAX_RANK):
            out = empty(2, n), empty(2, 8), empty(2, 8, dtype=torch.int64)
            basis, factors = (empty(2, N, n), empty(2, K, n), empty(2, n)), (empty(2, N, rank), empty(2, K, rank))
            yield "fp32", spectral.plan_rates(*basis, *factors, 2.0, 1e-6, False, out)


def main(target: str, brief: bool = False) -> None:
    seen = set()
    for dtype, launch in largest(target) if brief else itertools.chain(everything(target), prelaunch(target)):
        compiled = compile_launch(launch, target)
        if compiled.hash in seen:
            continue
        seen.add(compiled.hash)
        found = resources(compiled, tiles.TARGETS[target])
        constants = {k: v for k, v in launch.constants.items() if k.startswith(("BLOCK", "R_BLOCK", "EVEN"))}
        tile = {**constants, "warps": launch.num_warps, "stages": launch.num_stages}
        line = {
            "kernel": launch.kernel.__name__, "dtype": dtype, "tile": tile, "registers": found.registers,
            "spilled": found.spilled, "shared": found.shared, "matrix": found.matrix_instructions,
            "warp_matrix": found.warp_instructions,
            "problems": found.problems(tiles.TARGETS[target]),
        }  # fmt: skip
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:] == ["brief"])
