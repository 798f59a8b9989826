"""MODELLED, not measured: what is the least time that pre-launch of LLaMA-7B can take on an A100 and an RTX 3090?

    python -m benchmarks.prelaunch.modelled [--out benchmarks/results]

Takes a second: it only counts. The paper adapts q, k, v, up and down: 32 blocks of three 4096 x 4096 and two 4096 x 11008 layers. Every step of a route
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
from loradash_kernels.directions.policy import tail_power_iters, tail_rank

# How many layers of which short and long side.
LAYERS = ((96, 4096, 4096), (64, 4096, 11008))
OVERSAMPLE, R = 8, 16


@dataclass(frozen=True)
class Card:
    """The published peaks: FLOP/s of full-precision float32 and of float64 products, bytes/s of memory."""

    name: str
    float32: float
    float64: float
    bandwidth: float


A100 = Card("A100 40 GB", 19.5e12, 19.5e12, 1.555e12)
RTX3090 = Card("RTX 3090", 35.6e12, 0.556e12, 0.936e12)


@dataclass(frozen=True)
class Step:
    """FLOPs and bytes of one step; wide: in float64."""

    flops: float
    bytes: float = 0.0
    wide: bool = False

    def seconds(self, card: Card) -> float:
        return max(self.flops / (card.float64 if self.wide else card.float32), self.bytes / card.bandwidth)


def tail(n: int) -> list[Step]:
    """LU, triangular solves, CholeskyQR in float64, residuals of what is chosen."""
    width = tail_rank(n) + OVERSAMPLE
    solves = 2 * tail_power_iters(n) + 1
    return [
        Step(2 / 3 * n**3, 8.0 * n * n),
        *[Step(2.0 * n * n * width, 4.0 * n * n)] * solves,
        *[Step(2 * 4.0 * n * width**2, 4 * 8.0 * n * width, wide=True)] * (solves - 1),
        Step(4.0 * n * n * 8, 2 * 4.0 * n * n),
    ]


def eigen(n: int, wide: bool) -> list[Step]:
    """All eigenvectors: a tridiagonalisation, half of which reads what is left of the matrix for every column.

    Its other half is blocked, and that, divide and conquer and the back-transformation are products.
    """
    size = 8.0 if wide else 4.0
    return [Step(2 / 3 * n**3, size * n**3 / 3, wide), Step((2 / 3 + 4 / 3 + 2) * n**3, wide=wide)]


def gram(n: int, long: int, wide: bool) -> list[Step]:
    return [Step(5 / 8 * 2.0 * n * n * long, 2.0 * n * long, wide), *eigen(n, wide)]


def svd(n: int, long: int) -> list[Step]:
    """LAPACK's gesdd in float32: a QR first where the matrix is long, a bidiagonalisation (half by columns), both bases."""
    qr = [Step(2.0 * n * n * (long - n / 3), 8.0 * n * long), Step(2.0 * n * n * long)] if long > n else []
    return [*qr, Step(4 / 3 * n**3, 4.0 * 2 * n**3 / 3), Step((4 / 3 + 8 / 3 + 4) * n**3)]


def rates(n: int, long: int) -> list[Step]:
    return [Step(2.0 * (n + long) * n * R, 4.0 * (n + long) * n)]


def warm(n: int, long: int) -> list[Step]:
    """A launch from a cache: the rowwise product of the tail or the basis; W is read to check or refine what is chosen."""
    if n == long:
        return [
            Step(2.0 * 2 * n * tail_rank(n) * R, 4.0 * 2 * n * tail_rank(n)),
            Step(4.0 * n * n * 8, 2 * 2.0 * n * n),
        ]
    candidates = 32
    return [
        Step(2.0 * n * n * R, 2.0 * n * n),
        Step(4.0 * n * long * candidates, 2 * 2.0 * n * long),
        Step(6.0 * n * n * candidates, 3 * 2.0 * n * n),
        Step(4.0 * n * long * 8, 2 * 2.0 * n * long),
    ]


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


def least(steps: list[Step], card: Card) -> float:
    return sum(step.seconds(card) for step in steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows = []
    for card in (A100, RTX3090):
        seconds = {
            name: [count * least(route(n, k, card), card) for count, n, k in LAYERS] for name, route in ROUTES.items()
        }
        for name, (square, rectangular) in seconds.items():
            rows.append(
                {
                    "card": card.name,
                    "route": name,
                    "96 of 4096^2, s": f"{square:.2f}",
                    "64 of 4096 x 11008, s": f"{rectangular:.2f}",
                    "all 160, s": f"{square + rectangular:.2f}",
                    "over exact": f"{(square + rectangular) / sum(seconds['exact']):.3f}",
                }
            )
    table = Table(*rows[0], title="MODELLED lower bounds, no GPU was used: pre-launch of LLaMA-7B")
    for row in rows:
        table.add_row(*row.values())
    Console(width=150).print(table)
    if options.out:
        write_csv(options.out / "prelaunch_modelled.csv", rows)


if __name__ == "__main__":
    main()
