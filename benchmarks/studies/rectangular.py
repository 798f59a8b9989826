"""Is there a cheaper route than all eigenvectors for rectangular layers, whose spectrum is flat at the small end?

    OMP_NUM_THREADS=1 python -m benchmarks.studies.rectangular --factors FILE

FILE as for benchmarks.prelaunch.speed; a minute or two. Prints the share of the true top 8 directions that each candidate
finds on the rectangular layers of all-MiniLM-L6-v2, and its time over that of the Gram route, which finds them all. "ends": subspace iteration on the
inverse; "krylov": block Lanczos on the Gram matrix from the columns that the rates are made of, [B, W Aᵀ], with full
reorthogonalisation; "filter": how much of the spectrum a bound on the rates could leave out at best.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.prelaunch.speed import minilm
from loradash_kernels import batched_randomized_svd, change_rates, task_specific_directions
from loradash_kernels.directions.decompositions import gram_decomposition
from loradash_kernels.directions.linalg import orthonormal


def found(vectors: Tensor, rates: Tensor, true: Tensor) -> float:
    """Share of the true vectors (n, 8) that the eight of highest rate, columns of `vectors`, match to a cosine of 0.9."""
    best = vectors[:, rates.topk(8).indices]
    return float(((true.mT @ best).abs().amax(1) > 0.9).double().mean())


def ends(w: Tensor, a: Tensor, b: Tensor, rank: int, steps: int) -> tuple[Tensor, Tensor]:
    u, sigma, vt = batched_randomized_svd(w, rank, power_iters=steps, generator=torch.Generator().manual_seed(0))
    return u, ((u.mT @ b) * (vt @ a.mT)).sum(-1).abs() / sigma


def krylov(w: Tensor, a: Tensor, b: Tensor, dimension: int) -> tuple[Tensor, Tensor]:
    block = orthonormal(torch.cat((b, w @ a.mT), 1))
    basis = block
    while basis.shape[1] < dimension:
        block = w @ (w.mT @ block)
        for _ in range(2):
            block = block - basis @ (basis.mT @ block)
        block = orthonormal(block)
        basis = torch.cat((basis, block), 1)
    image = w.mT @ basis
    squares, coordinates = torch.linalg.eigh(image.mT @ image)
    vectors = basis @ coordinates
    return vectors, ((vectors.mT @ b) * (vectors.mT @ (w @ a.mT))).sum(-1).abs() / squares.clamp_min(1e-12)


def can_win(u: Tensor, vt: Tensor, sigma: Tensor, rate: Tensor, a: Tensor, b: Tensor, size: int) -> float:
    """Share of slices of `size` neighbours in the spectrum that the bound ‖U_sᵀB‖ ‖A V_s‖ / σ cannot rule out."""
    left, right = (t.split(size) for t in ((u.mT @ b), (vt @ a.mT)))
    norm = torch.linalg.matrix_norm
    bounds = torch.stack(
        [norm(x, 2) * norm(y, 2) / s[-1] for x, y, s in zip(left, right, sigma.split(size), strict=True)]
    )
    return float((bounds >= rate.topk(8).values[-1]).double().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--factors", type=Path, required=True)
    torch.manual_seed(0)
    groups = [g for g in minilm(parser.parse_args().factors) if g[1].shape[-1] != g[1].shape[-2]]
    layers = [
        (w, a, b) if w.shape[0] < w.shape[1] else (w.mT.contiguous(), b.mT, a.mT)
        for _, ws, as_, bs, _ in groups
        for w, a, b in zip(ws, as_, bs, strict=True)
    ]
    n = min(layers[0][0].shape)
    truths = [change_rates(*(t.double() for t in layer), method="exact") for layer in layers]
    places = torch.cat([t.rate.topk(8).indices for t in truths]).double() / (n - 1)
    quantiles = ", ".join(f"{float(places.quantile(q)):.2f}" for q in (0.0, 0.05, 0.5))
    candidates = {
        f"ends, rank n / {f}, {steps} steps": (ends, n // f, steps) for f, steps in ((6, 6), (3, 6), (2, 6), (2, 20))
    }
    candidates |= {f"krylov, {share:.0%} of n": (krylov, int(share * n)) for share in (0.25, 0.5, 0.75, 1.0)}  # type: ignore[dict-item]
    table = Table(
        "route", "top 8 found", "time over gram", title=f"{len(layers)} layers of {tuple(layers[0][0].shape)}"
    )
    for name, (route, *options) in candidates.items():
        shares, ratios = [], []
        for (w, a, b), truth in zip(layers, truths, strict=True):
            start = time.perf_counter()
            vectors, rates = route(w, a, b, *options)
            middle = time.perf_counter()
            gram_decomposition(w[None], torch.float32)
            ratios.append((middle - start) / (time.perf_counter() - middle))
            true = truth.u[:, truth.rate.topk(8).indices].float()
            shares.append(found(vectors, rates, true))
        share, ratio = (float(torch.tensor(t).mean()) for t in (shares, ratios))
        table.add_row(name, f"{share:.3f}", f"{ratio:.2f}")
    console = Console(width=150)
    console.print(f"relative index of the true top 8 (1 = smallest sigma): lowest, 5%, median: {quantiles}")
    console.print(table)
    for size in (1, 4, 16, 64):
        left = [
            can_win(t.u, t.vt, t.sigma, t.rate, a.double(), b.double(), size)
            for t, (_, a, b) in zip(truths, layers, strict=True)
        ]
        console.print(f"filter, slices of {size}: {sum(left) / len(left):.2f} of the spectrum cannot be ruled out")
    routes = {r for w, a, b in layers for r in task_specific_directions(w, a, b, 8).routes}
    console.print(f"routes taken by auto: {', '.join(routes)}")


if __name__ == "__main__":
    main()
