"""What the GPU kernels request, counted by the emulator beside a plain Triton GEMM of the same tile. No GPU is needed.

    python -m benchmarks.counters.triton_counters [--architecture sm_80] [--out benchmarks/results]

Per kernel and tile: tensor instructions, warp instructions, bytes requested (32-byte sectors) and touched (each once),
bank conflicts. Products are given over a plain GEMM, passes over their one large operand. These are counts of executed
PTX, not times.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from benchmarks.support.measure import write_csv
from loradash_kernels.backends.triton import tiles
from loradash_kernels.backends.triton.plan.backward import plan_backward
from loradash_kernels.backends.triton.plan.forward import plan_forward
from loradash_kernels.backends.triton.problem import KernelLaunch, Problem
from loradash_kernels.backends.triton.strategies import Strategy
from loradash_kernels.testing import make_case
from tests.support import triton_emulation as emulation

M_PRODUCTS, M_PASSES, K, N, RANK, DIRECTIONS = 256, 2048, 1024, 1024, 16, 8
BF16, F32 = torch.bfloat16, torch.float32


@triton.jit
def plain_gemm(
    x,
    w,
    y,
    M,
    N,
    K,
    stride_xm,
    stride_wn,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """y = x W^T, with nothing else."""
    m0, n0 = tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_N
    rows, columns, ks = tl.arange(0, BLOCK_M)[:, None], tl.arange(0, BLOCK_N)[None, :], tl.arange(0, BLOCK_K)
    x += m0.to(tl.int64) * stride_xm + rows * stride_xm + ks[None, :]
    w += n0.to(tl.int64) * stride_wn + columns * stride_wn + ks[:, None]
    mask_x, mask_w = rows < M - m0, columns < N - n0
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for _ in tl.range(0, K, BLOCK_K):
        acc = tl.dot(tl.load(x, mask=mask_x, other=0.0), tl.load(w, mask=mask_w, other=0.0), acc)
        x += BLOCK_K
        w += BLOCK_K
    out = m0.to(tl.int64) * N + n0 + rows * N + columns
    tl.store(y + out, acc.to(y.dtype.element_ty), mask=mask_x & mask_w)


def plain(x: torch.Tensor, w: torch.Tensor, y: torch.Tensor, tile: Any) -> KernelLaunch:
    (m, k), n = x.shape, w.shape[0]
    return KernelLaunch(
        plain_gemm,
        (-(-m // tile.block_m), -(-n // tile.block_n)),
        {"x": x, "w": w, "y": y, "M": m, "N": n, "K": k, "stride_xm": x.stride(0), "stride_wn": w.stride(0)},
        {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k},
        tile.num_warps,
        tile.num_stages,
    )


def count(launch: KernelLaunch, architecture: str) -> dict[str, float]:
    compiled = emulation.compile_launch(launch, architecture)
    stats = emulation.emulate(launch, compiled)
    return {
        "tensor": stats.insts.get("mma", 0),
        "warp": stats.warp_insts,
        "requested": 32 * (stats.gld["sectors"] + stats.gst["sectors"]),
        "touched": stats.unique_load_bytes + stats.unique_store_bytes,
        "conflicts": stats.smem["conflicts"] / max(stats.smem["wavefronts"], 1),
        "registers": emulation.resources(compiled, tiles.TARGETS[architecture]).registers,
    }


def launches(problems: tuple[Problem, Problem], strategy: Strategy) -> list[KernelLaunch]:
    """The launches of one forward and backward pass that are kernels of ours."""
    found = [*plan_forward(problems[0], strategy), *plan_backward(problems[1], strategy)]
    return [launch for launch in found if isinstance(launch, KernelLaunch)]


def make(m: int, architecture: str) -> tuple[tuple[Problem, Problem], Any]:
    case = make_case(m, K, N, RANK, DIRECTIONS, BF16, adapter_dtype=F32, dropout_p=0.05, bias=False)
    return emulation.problems_of(case, architecture), case


def products(architecture: str) -> Iterator[dict[str, Any]]:
    """Every tile of the two large products and of the one-launch forward, over a plain GEMM of that tile."""
    problems, case = make(M_PRODUCTS, architecture)
    target, weight = problems[0].target, problems[0].weight
    assert weight is not None
    # dx = dy W is a plain GEMM y = x W^T of the turned weight.
    turned = weight.t().contiguous()
    y = torch.empty(M_PRODUCTS, N, dtype=BF16)
    wanted = [("fused", t, ("extended_gemm", "dx_gemm")) for t in tiles.gemm_table(target, 2)]
    wanted += [("one_launch", t, ("one_launch_forward",)) for t in tiles.one_launch_table(target, 2)]
    if target.asynchronous:
        wanted += [("descriptors", t, ("descriptor_forward", "descriptor_dx")) for t in tiles.gemm_table(target, 2)]
    for kind, tile, kernels in tqdm(wanted, desc="products", file=sys.stderr):
        plains: dict[bool, dict[str, float]] = {}
        for launch in launches(problems, Strategy(kind, tile)):
            kernel = launch.kernel.__name__
            if kernel not in kernels:
                continue
            backward = kernel.endswith(("dx", "dx_gemm"))
            if backward not in plains:
                operands = (
                    (case.dy, turned, torch.empty(M_PRODUCTS, K, dtype=BF16)) if backward else (case.x, weight, y)
                )
                plains[backward] = count(plain(*operands, tile), architecture)
            found, reference = count(launch, architecture), plains[backward]
            ratios = {
                f"{key} / plain": found[key] / reference[key] for key in ("tensor", "warp", "requested", "touched")
            }
            name = f"{tile.block_m}x{tile.block_n}x{tile.block_k}, {tile.num_warps} warps, {tile.num_stages} stages"
            yield {
                "architecture": architecture,
                "kernel": kernel,
                "tile": name,
                "M": M_PRODUCTS,
                **found,
                **ratios,
                "conflicts of plain": reference["conflicts"],
            }


def passes(architecture: str) -> Iterator[dict[str, Any]]:
    """The passes over one large operand: bytes over those of the operand, which a pass may read once."""
    problems, _ = make(M_PASSES, architecture)
    large = {"down_projection": 2 * M_PASSES * K, "dy_pass": 2 * M_PASSES * N, "x_pass": 2 * M_PASSES * K}
    for launch in tqdm(launches(problems, Strategy()), desc="passes", file=sys.stderr):
        kernel = launch.kernel.__name__
        if kernel in large:
            found = count(launch, architecture)
            ratios = {f"{key} / operand": found[key] / large[kernel] for key in ("requested", "touched")}
            tile = ", ".join(
                f"{k.lower()} {launch.constants[k]}" for k in ("BLOCK_M", "BLOCK_N", "BLOCK_K") if k in launch.constants
            )
            yield {"architecture": architecture, "kernel": kernel, "tile": tile, "M": M_PASSES, **found, **ratios}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for triton_counters_<architecture>.csv")
    parser.add_argument("--architecture", choices=["sm_80", "sm_86", "sm_90"], default="sm_80")
    arguments = parser.parse_args()
    reason = emulation.missing_tools()
    if reason:
        raise SystemExit(f"nothing can be emulated here: {reason}")
    architecture = arguments.architecture
    product_rows, pass_rows = list(products(architecture)), list(passes(architecture))
    about = f"{architecture}, K {K}, N {N}, r {RANK}, s {DIRECTIONS}, bf16, dropout 0.05"
    keys = ("tensor / plain", "warp / plain", "requested / plain", "touched / plain")
    console = Console(width=150)
    shown = Table(
        "kernel", "tile", "registers", *keys, "conflicts (plain)", title=f"{about}, M {M_PRODUCTS}: over a plain GEMM"
    )
    for row in product_rows:
        conflicts = f"{row['conflicts']:.1%} ({row['conflicts of plain']:.1%})"
        shown.add_row(row["kernel"], row["tile"], str(row["registers"]), *(f"{row[k]:.3f}" for k in keys), conflicts)
    console.print(shown)
    console.print(
        f"(K + 32) / K = {(K + 32) / K:.4f}, (K + 64) / K = {(K + 64) / K:.4f}: R = 24 padded to the rank columns"
    )
    keys = ("requested / operand", "touched / operand")
    shown = Table(
        "kernel", "tile", "registers", *keys, "conflicts", title=f"{about}, M {M_PASSES}: over the bytes of x or dy"
    )
    for row in pass_rows:
        shown.add_row(
            row["kernel"],
            row["tile"],
            str(row["registers"]),
            *(f"{row[k]:.3f}" for k in keys),
            f"{row['conflicts']:.1%}",
        )
    console.print(shown)
    if arguments.out:
        fields = dict.fromkeys(key for row in [*product_rows, *pass_rows] for key in row)
        rows = [{key: row.get(key, "") for key in fields} for row in [*product_rows, *pass_rows]]
        write_csv(arguments.out / f"triton_counters_{architecture}.csv", rows)


if __name__ == "__main__":
    main()
