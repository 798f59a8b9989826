"""Pre-launch on the device over one exact SVD a layer: time, and how many of the right directions it finds.

    python -m benchmarks.proof.prelaunch [--device cuda] [--small]

The truth is computed in float64 here. As in the paper, the top 8 found are compared with the top 16 that are right
(accuracy), and the top 4 that are right with the 8 found (recall).
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
import time
from collections.abc import Callable

import torch

from loradash_kernels import direction_accuracy, direction_recall, task_specific_directions

from .ledger import Row
from .worker import Unit, expect, work

# Layers, N, K.
SHAPES = ((4, 2048, 2048), (1, 4096, 4096), (2, 1024, 4096), (1, 11008, 4096))
SMALL = ((2, 128, 128), (2, 64, 256))
SCALING, EPS = 2.0, 1e-6
ROUNDS = 3
# Of the 8 found, and of the top 4, those that must be right: the tail route, in float32, is held to the paper's 0.9.
LEAST = 0.9


def layers(count: int, n: int, k: int, device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gaussian weights, graded at the small end where square, and the factors of an update: W (L, N, K), A, B."""
    g = torch.Generator().manual_seed(0)
    w = torch.randn(count, n, k, generator=g) / k**0.5
    a, b = 0.01 * torch.randn(count, 8, k, generator=g), 0.01 * torch.randn(count, n, 8, generator=g)
    return w.to(device), a.to(device), b.to(device)


def truth(w: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """(L, 16): the right directions, highest change rate first. By the Gram matrix in float64, which leaves eight digits of
    what is smallest; the SVD in float64 would take most of the stage's time."""
    if w.shape[-2] < w.shape[-1]:
        return truth(w.mT, b.mT, a.mT)
    squares, v = torch.linalg.eigh(w.mT @ w)
    sigma, v = squares.clamp(min=0).sqrt().flip(-1), v.flip(-1)
    u = w @ v / sigma[..., None, :]
    delta = SCALING * ((u.mT @ b) * (a @ v).mT).sum(-1)
    return (delta.abs() / (sigma + EPS)).topk(16).indices


def seconds(call: Callable[[], object], device: str, rounds: int = ROUNDS) -> float:
    """Median wall time, the device idle before and after; the first call does not count where there are several."""
    times = []
    for _ in range(rounds + 1 if rounds > 1 else 1):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:] or times)


def measure(count: int, n: int, k: int, device: str) -> Row:
    w, a, b = layers(count, n, k, device)
    found = task_specific_directions(w, a, b, 8, scaling=SCALING, eps=EPS)
    right = truth(w.double(), a.double(), b.double())
    accuracy = float(direction_accuracy(found.index, right).mean())
    recall = float(direction_recall(found.index, right[:, :4]).mean())
    ours = seconds(lambda: task_specific_directions(w, a, b, 8, scaling=SCALING, eps=EPS), device)
    # One call, since it takes seconds; before it a small one, at which the library loads its kernels.
    torch.linalg.svd(w[0, :64, :64], full_matrices=False)
    exact = seconds(lambda: [torch.linalg.svd(matrix, full_matrices=False) for matrix in w], device, rounds=1)
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
