"""What the GPU kernels request, counted by the emulator beside a plain Triton GEMM of the same tile. No GPU is needed.

    python benchmarks/gpu_counters.py [--out benchmarks/results]

Per kernel and tile: tensor instructions, warp instructions, bytes requested (32-byte sectors) and touched (each once),
bank conflicts. Products are given over the plain GEMM y = x W^T; passes over their one large operand. These are counts
of executed PTX, not times.
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
from loradash_kernels._triton import plan, tiles
from loradash_kernels.testing import make_case
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import emulation
from measure import environment, write_csv

M, K, N, RANK, DIRECTIONS = 512, 1024, 512, 16, 8


@triton.jit
def plain_gemm(
    x, w, y, M, N, K, stride_xm, stride_wn,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
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


def plain(x: torch.Tensor, w: torch.Tensor, y: torch.Tensor, tile: Any) -> plan.Launch:
    (m, k), n = x.shape, w.shape[0]
    return plan.Launch(
        plain_gemm,
        (-(-m // tile.block_m), -(-n // tile.block_n)),
        {"x": x, "w": w, "y": y, "M": m, "N": n, "K": k, "stride_xm": x.stride(0), "stride_wn": w.stride(0)},
        {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k},
        tile.num_warps,
        tile.num_stages,
    )


def count(launch: plan.Launch, architecture: str) -> dict[str, float]:
    compiled = emulation.compile_launch(launch, architecture)
    stats = emulation.emulate(launch, compiled)
    return {
        "tensor": stats.insts.get("mma", 0), "warp": stats.warp_insts,
        "requested": 32 * (stats.gld["sectors"] + stats.gst["sectors"]),
        "touched": stats.unique_load_bytes + stats.unique_store_bytes,
        "conflicts": stats.smem["conflicts"] / max(stats.smem["wavefronts"], 1),
        "registers": emulation.resources(compiled, tiles.TARGETS[architecture]).registers,
    }  # fmt: skip


def measure(architecture: str, tile: Any) -> Iterator[dict[str, Any]]:
    """The launches of one forward and backward, with the plain GEMM first."""
    case = make_case(M, K, N, RANK, DIRECTIONS, torch.bfloat16, adapter_dtype=torch.float32, dropout_p=0.05, bias=False)
    q = emulation.problem_of(case, architecture)
    y, p = torch.empty(M, N, dtype=torch.bfloat16), torch.empty(M, q.width)
    grads = [torch.empty(M, K, dtype=torch.bfloat16), torch.empty(RANK, K), torch.empty(N, RANK), torch.empty(DIRECTIONS)]
    assert q.weight is not None
    base = count(plain(case.x, q.weight, y, tile), architecture)
    back = count(plain(case.dy, q.weight.t().contiguous(), grads[0], tile), architecture)  # dx = dy W, as a plain GEMM
    large = {"down_projection": 2 * M * K, "dy_pass": 2 * M * N, "x_pass": 2 * M * K}  # bytes of the operand
    name = f"{tile.block_m}x{tile.block_n}x{tile.block_k}"
    strategy = plan.Strategy("fused", tile)
    launches = plan.plan_forward(q, None, None, y, p, strategy)
    backward = plan.plan_backward(q, case.dy, p, *grads, None, strategy)
    one = plan.plan_forward(q, None, None, y, p, plan.Strategy("one_launch", tiles.one_launch_table(q.target, 2)[0]))
    for launch in [*launches, *backward, *one]:
        assert isinstance(launch, plan.Launch)
        kernel = launch.kernel.__name__
        found = count(launch, architecture)
        row: dict[str, Any] = {"architecture": architecture, "kernel": kernel, "tile": name, **found}
        reference = {"extended_gemm": base, "dx_gemm": back}.get(kernel)
        if kernel == "one_launch_forward":
            t = tiles.one_launch_table(q.target, 2)[0]
            row["tile"] = f"{t.block_m}x{t.block_n}x{t.block_k}"
            reference = count(plain(case.x, q.weight, y, t), architecture)
        if reference:
            for key in ("tensor", "warp", "requested", "touched"):
                row[f"{key} / plain"] = found[key] / reference[key]
            row["conflicts of plain"] = reference["conflicts"]
        elif kernel in large:
            row["touched / operand"] = found["touched"] / large[kernel]
        yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for triton_counters.csv")
    parser.add_argument("--architecture", choices=["sm_80", "sm_86", "sm_90"], default="sm_80")
    arguments = parser.parse_args()
    reason = emulation.missing_tools()
    if reason:
        raise SystemExit(f"nothing can be emulated here: {reason}")
    architecture = arguments.architecture
    table = tiles.gemm_table(tiles.TARGETS[architecture], 2)
    rows = [row for tile in tqdm(table, desc="tiles", file=sys.stderr) for row in measure(architecture, tile)]
    shown = Table(
        "kernel", "tile", "registers", "tensor / plain", "warp insts / plain", "requested / plain", "touched / plain",
        "touched / operand", "conflicts (plain)",
        title=f"{architecture}, M {M}, K {K}, N {N}, r {RANK}, s {DIRECTIONS}, bf16, dropout 0.05",
    )  # fmt: skip
    for row in rows:
        ratios = [f"{row[k]:.3f}" if k in row else "" for k in (
            "tensor / plain", "warp / plain", "requested / plain", "touched / plain", "touched / operand",
        )]  # fmt: skip
        plain_conflicts = f" ({row['conflicts of plain']:.1%})" if "conflicts of plain" in row else ""
        shown.add_row(
            row["kernel"], row["tile"], str(row["registers"]), *ratios, f"{row['conflicts']:.1%}{plain_conflicts}"
        )
    Console(width=150).print(shown)
    print(f"(K + R padded) / K = {(K + 32) / K:.4f}")
    if arguments.out:
        write_csv(arguments.out / f"triton_counters_{architecture}.csv", rows, environment())


if __name__ == "__main__":
    main()
