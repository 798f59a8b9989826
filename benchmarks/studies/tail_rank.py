"""How small may the tail be, and how does that grow with n? Share of the true top 8 directions in the last triplets.

    python -m benchmarks.studies.tail_rank --factors FILE
    python -m benchmarks.studies.tail_rank --synthetic

--factors takes the square layers of all-MiniLM-L6-v2 (FILE as for benchmarks.prelaunch.speed) and about a minute;
--synthetic trains LoRA for 100 steps on weights of n = 384 to 3072 and takes about ten minutes on one core, most of
them for the SVDs of n = 3072.

"within" asks whether the true directions lie within the tail at all, "found" what the randomized tail of that rank finds.

The synthetic weights follow what Staats, Thamm and Rosenow (NeurIPS 2025, arXiv 2410.17770) report of Llama and BERT:
a bulk as of a random matrix, and departures at both ends, where the singular vectors overlap with the main directions of
the activations. Here: a Gaussian bulk, 1% of outliers above it up to ten times as large, the smallest tenth shrunk, and
inputs of power-law covariance whose main directions are those of the two ends. "bulk" is the Gaussian matrix alone, with
inputs in random directions.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tqdm.auto import tqdm

from benchmarks.prelaunch.speed import minilm
from loradash_kernels import change_rates, direction_recall, task_specific_directions

FRACTIONS = (48, 24, 16, 12, 8, 6)
RANKS = (24, 32, 48, 64, 96, 128, 192)
SIZES = (384, 768, 1536, 3072)
STEPS, RANK, BATCH, LEARNING_RATE = 100, 8, 256, 1e-3


def real(factors: Path) -> Table:
    title, w, a, b, scaling = next(g for g in minilm(factors) if g[1].shape[-1] == g[1].shape[-2])
    n = w.shape[-1]
    truth = change_rates(w.double(), a.double(), b.double(), scaling=scaling, method="exact").rate.topk(8).indices
    condition = float(torch.linalg.cond(w).median())
    table = Table("tail", "triplets", "within", "found", title=f"{title}, median condition number {condition:.0f}")
    for fraction in FRACTIONS:
        rank = max(8, n // fraction)
        within = (truth >= n - rank).double().mean()
        found = task_specific_directions(w, a, b, 8, scaling=scaling, method="randomized", rank=rank).index
        table.add_row(
            f"n / {fraction}", str(rank), f"{within:.3f}", f"{float(direction_recall(found, truth).mean()):.3f}"
        )
    return table


def weight(n: int, departing: bool) -> tuple[Tensor, Tensor]:
    """W (n, n) and the square root (n, n) of the covariance of its inputs."""
    u, sigma, vt = torch.linalg.svd(torch.randn(n, n) / n**0.5)
    scales = torch.arange(1, n + 1) ** -0.5
    if not departing:
        return (u * sigma) @ vt, torch.linalg.qr(torch.randn(n, n))[0] * scales
    head, tail = max(1, n // 100), n // 10
    sigma[:head] *= torch.linspace(5, 1, head)
    sigma[-tail:] *= torch.linspace(1, 0.2, tail)
    ends = torch.cat((torch.arange(head), torch.arange(n - 1, n - tail - 1, -1)))
    middle = torch.arange(head, n - tail)
    return (u * sigma) @ vt, vt.mT[:, torch.cat((ends, middle[torch.randperm(len(middle))]))] * scales


def train(w: Tensor, root: Tensor) -> tuple[Tensor, Tensor]:
    """A and B after LoRA's usual start and STEPS of AdamW towards a W that differs by rank 16 and 5% of its norm."""
    n = w.shape[0]
    change = torch.randn(n, 16) @ torch.randn(16, n)
    target = 0.05 * torch.linalg.matrix_norm(w) / torch.linalg.matrix_norm(change) * change
    a = torch.nn.init.kaiming_uniform_(torch.empty(RANK, n), a=5**0.5).requires_grad_()
    b = torch.zeros(n, RANK, requires_grad=True)
    optimizer = torch.optim.AdamW([a, b], lr=LEARNING_RATE)
    for _ in range(STEPS):
        x = torch.randn(BATCH, n) @ root.mT
        loss = (2 * (x @ a.mT) @ b.mT - x @ target.mT).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return a.detach(), b.detach()


def synthetic(count: int) -> Table:
    columns = [f"last {rank}" for rank in RANKS]
    table = Table("spectrum", "n", "condition", *columns, "n / 12", title="share of the true top 8, LoRA r = 8")
    cases = [(departing, n) for departing in (False, True) for n in SIZES]
    for departing, n in tqdm(cases, unit="size"):
        distances, conditions = [], []
        for _ in range(count):
            w, root = weight(n, departing)
            rates = change_rates(w, *train(w, root), scaling=2.0, method="exact")
            distances.append(n - rates.rate.topk(8).indices)
            conditions.append(rates.sigma[0] / rates.sigma[-1])
        distance = torch.stack(distances)
        shares = [f"{float((distance <= rank).double().mean()):.3f}" for rank in (*RANKS, n // 12)]
        condition = f"{float(torch.stack(conditions).median()):.0f}"
        table.add_row("departing" if departing else "bulk", str(n), condition, *shares)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--factors", type=Path)
    parser.add_argument("--synthetic", action="store_true")
    parser.add_argument("--count", type=int, default=6, help="synthetic weights a size")
    options = parser.parse_args()
    if not (options.factors or options.synthetic):
        parser.error("--factors FILE or --synthetic")
    torch.manual_seed(0)
    if options.factors:
        Console(width=150).print(real(options.factors))
    if options.synthetic:
        Console(width=150).print(synthetic(options.count))


if __name__ == "__main__":
    main()
