"""MODELLED, not measured: the least time that pre-launch of LLaMA-7B can take on an A100 and an RTX 3090.

    python benchmarks/modelled_prelaunch.py [--out benchmarks/results]

The paper adapts q, k, v, up and down: 32 blocks of three 4096 x 4096 and two 4096 x 11008 layers. Every step of a route
counts its FLOPs and the bytes it must move, and takes the longer of the two at the card's published peaks: nothing
runs faster, libraries take a few times as long. What makes the routes differ (FLOPs, the float64 rate, the half of a
tridiagonalisation that reads the whole matrix for every column) is in the count.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.support.measure import write_csv
from loradash_kernels.directions.routes import TAIL_POWER_ITERS, tail_rank

LAYERS = ((96, 4096, 4096), (64, 4096, 11008))  # how many, n, long side
OVERSAMPLE, R = 8, 16


@dataclass(frozen=True)
class Card:
    name: str
    float32: float  # FLOP/s, vector units: full precision
    float64: float  # FLOP/s, of products
    bandwidth: float  # bytes/s


A100 = Card("A100 40 GB", 19.5e12, 19.5e12, 1.555e12)
RTX3090 = Card("RTX 3090", 35.6e12, 0.556e12, 0.936e12)


@dataclass(frozen=True)
class Step:
    flops: float
    bytes: float = 0.0
    wide: bool = False  # float64

    def seconds(self, card: Card) -> float:
        return max(self.flops / (card.float64 if self.wide else card.float32), self.bytes / card.bandwidth)


def tail(n: int) -> list[Step]:
    """LU, triangular solves, CholeskyQR in float64, residuals of what is chosen."""
    width = tail_rank(n) + OVERSAMPLE
    solves = 2 * TAIL_POWER_ITERS + 1
    return [
        Step(2 / 3 * n**3, 8.0 * n * n),
        *[Step(2.0 * n * n * width, 4.0 * n * n)] * solves,
        *[Step(2 * 4.0 * n * width**2, 4 * 8.0 * n * width, wide=True)] * (solves - 1),
        Step(4.0 * n * n * 8, 2 * 4.0 * n * n),
    ]


def eigen(n: int, wide: bool) -> list[Step]:
    """All eigenvectors: tridiagonalisation, of which half reads what is left for every column; the rest are products."""
    size = 8.0 if wide else 4.0
    return [
        Step(2 / 3 * n**3, size * n**3 / 3, wide),
        Step((2 / 3 + 4 / 3 + 2) * n**3, wide=wide),  # blocked half, divide and conquer, back-transformation
    ]


def gram(n: int, long: int, wide: bool) -> list[Step]:
    return [Step(5 / 8 * 2.0 * n * n * long, 2.0 * n * long, wide), *eigen(n, wide)]


def svd(n: int, long: int) -> list[Step]:
    """LAPACK's gesdd in float32: QR first where the matrix is long, bidiagonalisation (half by columns), both bases."""
    qr = [Step(2.0 * n * n * (long - n / 3), 8.0 * n * long), Step(2.0 * n * n * long)] if long > n else []
    return [*qr, Step(4 / 3 * n**3, 4.0 * 2 * n**3 / 3), Step((4 / 3 + 8 / 3 + 4) * n**3)]


def rates(n: int, long: int) -> list[Step]:
    return [Step(2.0 * (n + long) * n * R, 4.0 * (n + long) * n)]


def warm(n: int, long: int) -> list[Step]:
    """From a cache: the tail's or the basis's rowwise product, and W once or twice to check or refine what is chosen."""
    if n == long:
        return [
            Step(2.0 * 2 * n * tail_rank(n) * R, 4.0 * 2 * n * tail_rank(n)),
            Step(4.0 * n * n * 8, 2 * 2.0 * n * n),
        ]
    candidates = 32
    return [Step(2.0 * n * n * R, 2.0 * n * n), Step(4.0 * n * long * candidates, 2 * 2.0 * n * long),
            Step(6.0 * n * n * candidates, 3 * 2.0 * n * n), Step(4.0 * n * long * 8, 2 * 2.0 * n * long)]  # fmt: skip


Route = Callable[[int, int, Card], list[Step]]
ROUTES: dict[str, Route] = {
    "auto": lambda n, k, card: tail(n) if n == k else [*gram(n, k, wide=False), *rates(n, k)],
    "exact": lambda n, k, card: [
        *(svd(n, k) if n == k and card is RTX3090 else gram(n, k, wide=n == k)),
        *rates(n, k),
    ],
    "float32 SVD of every layer": lambda n, k, card: [*svd(n, k), *rates(n, k)],
    "warm cache": lambda n, k, card: warm(n, k),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows = []
    for card in (A100, RTX3090):
        for name, route in ROUTES.items():
            parts = [count * sum(step.seconds(card) for step in route(n, long, card)) for count, n, long in LAYERS]
            exact = sum(
                count * sum(step.seconds(card) for step in ROUTES["exact"](n, long, card)) for count, n, long in LAYERS
            )
            rows.append({
                "card": card.name, "route": name, "96 of 4096^2, s": f"{parts[0]:.2f}", "64 of 4096 x 11008, s": f"{parts[1]:.2f}",
                "all 160, s": f"{sum(parts):.2f}", "over exact": f"{sum(parts) / exact:.3f}",
            })  # fmt: skip
    table = Table(*rows[0], title="MODELLED lower bounds, no GPU was used: pre-launch of LLaMA-7B")
    for row in rows:
        table.add_row(*row.values())
    Console(width=150).print(table)
    if options.out:
        write_csv(options.out / "prelaunch_modelled.csv", rows)


if __name__ == "__main__":
    main()
