"""Prints what it costs that packed weights are never stale: the fingerprint of W over the rest of a forward call.

    OMP_NUM_THREADS=1 python -m benchmarks.layers.packed_weights [--rounds 7]

With one thread the clock is that thread's own time, which other programs on the machine do not lengthen.
"""

from __future__ import annotations

import argparse
import sys
import time

import torch
from loradash import DashConfig, DashLinear
from rich.console import Console
from rich.table import Table
from torch import nn
from tqdm import tqdm

from benchmarks.support.measure import environment, interleaved
from loradash_kernels.backends import extension

# Each size is (N, K).
SIZES = ((768, 768), (1024, 1024), (2048, 2048), (4096, 4096), (1024, 4096))
ROWS = (8, 16, 64, 256, 512, 2048)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def measure(n: int, k: int, m: int, dtype: torch.dtype, rounds: int) -> str:
    """'price, library': the fingerprint's share beyond the rest of the call, and nn.Linear's time over the call's."""
    linear, x = nn.Linear(k, n, bias=False, dtype=dtype).requires_grad_(False), torch.randn(m, k, dtype=dtype)
    layer = DashLinear.from_linear(linear, DashConfig(r=16, directions=8))
    fingerprint = extension.compiled().fingerprint
    steps = {"ours": lambda: layer(x), "fingerprint": lambda: fingerprint(layer.weight), "library": lambda: linear(x)}
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    flops = 2 * m * n * k
    with torch.no_grad():
        t = interleaved(steps, rounds, 20 if flops < 2**28 else 8 if flops < 2**31 else 3, clock=clock)
    price = t["fingerprint"] / max(t["ours"] - t["fingerprint"], 1e-9)
    return f"{100 * price:.1f}%, {t['library'] / t['ours']:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    table = Table("dtype", "N x K", *(f"M {m}" for m in ROWS), title="price of the fingerprint, nn.Linear over ours")
    for name, dtype in tqdm(DTYPES.items(), file=sys.stderr):
        for n, k in SIZES:
            table.add_row(name, f"{n}x{k}", *(measure(n, k, m, dtype, options.rounds) for m in ROWS))
    console = Console(width=160)
    console.print(table)
    console.print(environment())


if __name__ == "__main__":
    main()
