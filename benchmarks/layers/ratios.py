"""Prints what a layer costs over a frozen nn.Linear: time by variant, call overhead, bytes saved for backward.

    OMP_NUM_THREADS=1 python -m benchmarks.layers.ratios [--quick] [--compiled] [--out benchmarks/results]

One thread unless OMP_NUM_THREADS says otherwise: on a busy machine a second thread waits for its time slice in every
parallel region. Ratios within one run are what to quote; absolute times depend on the machine's mood.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from benchmarks.layers.variants import (
    COMPILED,
    DENSE,
    DIRECTIONS,
    DTYPES,
    FACTORED,
    FROZEN,
    OURS,
    PEFT,
    RANK,
    SHAPES,
    build,
)
from benchmarks.support import plots
from benchmarks.support.measure import environment, interleaved, write_csv

console = Console(width=140)


def layer_rows(names: list[str], rounds: int) -> list[dict[str, Any]]:
    """Times and saved bytes of every variant at every dtype and shape."""
    rows = []
    cases = [(d, s) for d in DTYPES for s in SHAPES]
    for dtype, shape in tqdm(cases, desc="layers", file=sys.stderr):
        built = build(shape, DTYPES[dtype], names)
        per_block = 6 if shape[1] * shape[2] < 2**21 else 3
        both = interleaved({n: c.step for n, c in built.items()}, rounds, per_block)
        forward = interleaved({n: c.forward for n, c in built.items()}, max(2, rounds // 3), per_block)
        for name, case in built.items():
            rows.append(
                {
                    "dtype": dtype,
                    "shape": "x".join(map(str, shape)),
                    "variant": name,
                    "forward+backward ms": 1e3 * both[name],
                    "ratio": both[name] / both[FROZEN],
                    "forward ratio": forward[name] / forward[FROZEN],
                    "saved bytes": case.saved_bytes(),
                }
            )
    return rows


def print_layers(rows: list[dict[str, Any]], names: list[str]) -> None:
    table = Table(
        "dtype",
        "M x K x N",
        *names,
        title="forward + backward over a frozen nn.Linear (forward alone), dropout 0.05, r 16, s 8",
    )
    ours: dict[str, list[float]] = {}
    for dtype in DTYPES:
        for shape in dict.fromkeys(r["shape"] for r in rows if r["dtype"] == dtype):
            found = {r["variant"]: r for r in rows if r["dtype"] == dtype and r["shape"] == shape}
            table.add_row(dtype, shape, *(f"{found[n]['ratio']:.3f} ({found[n]['forward ratio']:.2f})" for n in names))
            ours.setdefault(dtype, []).append(found[OURS]["ratio"])
    console.print(table)
    for dtype, ratios in ours.items():
        console.print(
            f"{dtype}: geometric mean of ours {statistics.geometric_mean(ratios):.3f}, worst {max(ratios):.3f}"
        )
    saved = Table("variant", *(f"M {m}, K {k}" for m, k, _ in SHAPES), title="bytes saved for backward beside x, fp32")
    for name in names:
        saved.add_row(name, *(f"{r['saved bytes']:,}" for r in rows if r["variant"] == name and r["dtype"] == "fp32"))
    saved.add_row("4 M R", *(f"{4 * m * (RANK + DIRECTIONS):,}" for m, _, _ in SHAPES))
    console.print(saved)


def overhead() -> dict[str, float]:
    """Microseconds of forward and backward of a layer of 64 features on 4 rows, where only the calls cost."""
    built = build((4, 64, 64), torch.float32, [FROZEN, PEFT, FACTORED, OURS])
    return {n: 1e6 * t for n, t in interleaved({n: c.step for n, c in built.items()}, 20, 50, warm=10).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--compiled", action="store_true", help="with the factored form under torch.compile (minutes)")
    parser.add_argument("--out", type=Path, help="folder for layers.csv and layers.png")
    options = parser.parse_args()
    names = [FROZEN, PEFT, DENSE, FACTORED, *([COMPILED] if options.compiled else []), OURS]
    rows = layer_rows(names, 3 if options.quick else 8)
    print_layers(rows, names)
    calls = overhead()
    table = Table(*calls, title="call overhead: forward + backward of 4 x 64 x 64, microseconds")
    table.add_row(*(f"{t:.0f}" for t in calls.values()))
    console.print(table)
    console.print(environment())
    if options.out:
        write_csv(options.out / "layers.csv", rows)
        write_csv(options.out / "overhead.csv", [{"variant": n, "microseconds": t} for n, t in calls.items()])
        groups: dict[str, dict[str, float]] = {}
        for r in rows:
            if r["variant"] != FROZEN:
                groups.setdefault(f"{r['dtype']}\n{r['shape']}", {})[r["variant"]] = r["ratio"]
        plots.ratio_bars(groups, "LoRA-Dash layers, forward + backward, one thread", options.out / "layers.png")


if __name__ == "__main__":
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    main()
