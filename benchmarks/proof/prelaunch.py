"""Pre-launch on the device over one exact SVD a layer: time, and how many of the right directions it finds.

    python -m benchmarks.proof.prelaunch [--device cuda] [--small]

The truth is the SVD's, one call a layer. As in the paper, the top 8 found are compared with the top 16 that are right
(accuracy), and the top 4 that are right with the 8 found (recall).
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
import time
from collections.abc import Callable
from typing import TypeVar

import torch

from loradash_kernels import direction_accuracy, direction_recall, task_specific_directions

from .ledger import Row
from .worker import Unit, expect, work

# Layers, N, K.
SHAPES = ((4, 2048, 2048), (1, 4096, 4096), (2, 1024, 4096))
SMALL = ((2, 128, 128), (2, 64, 256))
ROUNDS, WARM, SCALING = 3, 64, 2.0
T = TypeVar("T")
# Of the 8 found, and of the top 4, those that must be right: the tail route, in float32, is held to the paper's 0.9.
LEAST = 0.9


def layers(count: int, n: int, k: int, device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gaussian weights, graded at the small end where square, and the factors of an update: W (L, N, K), A, B."""
    g = torch.Generator().manual_seed(0)
    w = torch.randn(count, n, k, generator=g) / k**0.5
    a, b = 0.01 * torch.randn(count, 8, k, generator=g), 0.01 * torch.randn(count, n, 8, generator=g)
    return w.to(device), a.to(device), b.to(device)


def seconds(call: Callable[[], T], device: str) -> tuple[float, T]:
    """Wall time, the device idle before and after, and what the call returned."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    found = call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, found


def svds(w: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    return [torch.linalg.svd(matrix, full_matrices=False) for matrix in w]


def measure(count: int, n: int, k: int, device: str) -> Row:
    # Libraries load their kernels at the first call of each.
    task_specific_directions(*layers(1, WARM, WARM * k // n, device), 8, scaling=SCALING)
    svds(layers(1, WARM, WARM, device)[0])
    w, a, b = layers(count, n, k, device)
    times = []
    for _ in range(ROUNDS):
        spent, found = seconds(lambda: task_specific_directions(w, a, b, 8, scaling=SCALING), device)
        times.append(spent)
    ours = statistics.median(times)
    exact, triplets = seconds(lambda: svds(w), device)
    u, sigma, vt = (torch.stack(parts) for parts in zip(*triplets, strict=True))
    rates = SCALING * ((u.mT @ b) * (vt @ a.mT)).sum(-1).abs() / sigma
    truth = rates.topk(16).indices
    accuracy = float(direction_accuracy(found.index, truth).mean())
    recall = float(direction_recall(found.index, truth[:, :4]).mean())
    values = {
        "seconds": ours,
        "svd seconds": exact,
        "ratio": ours / exact,
        "accuracy": accuracy,
        "recall": recall,
        "routes": ", ".join(sorted({*found.routes})),
    }
    words = f"{ours:.3f} s, {ours / exact:.3f} of the SVD's; accuracy {accuracy:.3f}, recall {recall:.3f}"
    return expect(min(accuracy, recall) >= LEAST, words, **values)


def units(device: str, small: bool) -> list[Unit]:
    shapes = SMALL if small else SHAPES
    return [(f"{c} of {n}x{k}", functools.partial(measure, c, n, k, device)) for c, n, k in shapes]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args()
    return work(units(options.device, options.small))


if __name__ == "__main__":
    sys.exit(main())
