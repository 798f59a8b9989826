"""MODELLED, not measured: what the three ways to compute a layer must cost over a frozen one, on three cards.

    python -m benchmarks.layers.modelled [--out benchmarks/results]

Takes a second: it only counts. Every launch of a way counts its FLOPs and the bytes that it must move, and takes the longer of
the two at the card's published peaks (a product: at the share of the peak that --efficiency says a good library reaches). No
launch reuses what another left in the L2 cache, and launching is free. With X = MK, Y = MN, W = NK elements:

    library     forward: D x (reads X), y := low-rank terms (writes Y), y += x W^T (reads X, W, Y, writes Y)
                backward: G, dB (read Y), dx := low-rank terms (writes X), dx += dy W (reads Y, W, X, writes X), dA (reads X)
    fused       forward: D x (reads X), one product of K + R columns; backward: G, dB (read Y), one product of N + R, dA (reads X)
    one launch  forward: the product alone, which accumulates D x from the tiles that it holds; backward: fused, with G from
                the product's own tiles

M hardly matters: products and passes grow with it alike.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.layers.variants import DIRECTIONS, RANK
from benchmarks.layers.verdicts import OVER_FROZEN
from benchmarks.support.measure import write_csv

SHAPES = ((8192, 4096, 4096), (8192, 4096, 11008), (8192, 11008, 4096), (8192, 8192, 8192))
WIDTH = RANK + DIRECTIONS
# The share of the published peak that the largest products of a vendor's library reach.
EFFICIENCY = 0.8
BYTES = 2


@dataclass(frozen=True)
class Card:
    """Published peaks: FLOP/s of dense bf16 products with sums in fp32, bytes/s of memory."""

    name: str
    flops: float
    bandwidth: float


CARDS = (
    Card("A100 SXM 80 GB", 312e12, 2.039e12),
    Card("RTX 3090", 71e12, 0.936e12),
    Card("H100 SXM 80 GB", 989e12, 3.35e12),
)


@dataclass(frozen=True)
class Launch:
    """FLOPs of matrix instructions, and elements of 16 bits that it moves."""

    flops: float
    elements: float

    def seconds(self, card: Card, efficiency: float) -> float:
        return max(self.flops / (efficiency * card.flops), BYTES * self.elements / card.bandwidth)


def product(m: int, depth: int, wide: int, read_sum: bool = False, more: int = 0) -> Launch:
    """(m, depth) times (depth, wide). read_sum: it is added to what is there. more: FLOPs of what the same tiles serve."""
    elements = m * depth + depth * wide + m * wide * (2 if read_sum else 1)
    return Launch(2.0 * m * depth * wide + more, elements)


def frozen(m: int, k: int, n: int) -> dict[str, list[Launch]]:
    return {"forward": [product(m, k, n)], "backward": [product(m, n, k)]}


def ways(m: int, k: int, n: int) -> dict[str, dict[str, list[Launch]]]:
    """Strategy -> pass -> launches; R columns of low-rank terms, P in fp32."""
    # P and T of the forward pass, G of the backward pass.
    narrow = 3.0 * m * WIDTH
    down = Launch(2.0 * m * k * WIDTH, m * k + narrow)
    dy = Launch(2.0 * m * n * (WIDTH + RANK), m * n + narrow)
    x = Launch(2.0 * m * k * RANK, m * k + narrow)
    up, low = (Launch(2.0 * m * side * WIDTH, m * side + narrow) for side in (n, k))
    wider = product(m, k + WIDTH, n), product(m, n + WIDTH, k)
    return {
        "library": {
            "forward": [down, up, product(m, k, n, read_sum=True)],
            "backward": [dy, low, product(m, n, k, read_sum=True), x],
        },
        "fused": {"forward": [down, wider[0]], "backward": [dy, wider[1], x]},
        "one launch": {
            "forward": [product(m, k + WIDTH, n, more=2 * m * k * WIDTH)],
            "backward": [product(m, n + WIDTH, k, more=2 * m * n * (WIDTH + RANK)), x],
        },
    }


def bound(launches: list[Launch], card: Card, efficiency: float) -> float:
    return sum(launch.seconds(card, efficiency) for launch in launches)


def rows(efficiency: float) -> Iterator[dict[str, Any]]:
    for card in CARDS:
        for m, k, n in SHAPES:
            base = {pass_: bound(found, card, efficiency) for pass_, found in frozen(m, k, n).items()}
            for name, passes in ways(m, k, n).items():
                seconds = {pass_: bound(found, card, efficiency) for pass_, found in passes.items()}
                ratios = {pass_: seconds[pass_] / base[pass_] for pass_ in base}
                yield {
                    "card": card.name,
                    "M": m,
                    "K": k,
                    "N": n,
                    "efficiency": efficiency,
                    "strategy": name,
                    **{f"{pass_}, us": 1e6 * seconds[pass_] for pass_ in base},
                    **{f"{pass_} / frozen": ratios[pass_] for pass_ in base},
                    "step / frozen": sum(seconds.values()) / sum(base.values()),
                    "within limits": all(ratios[pass_] <= limit for pass_, limit in OVER_FROZEN.items()),
                }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--efficiency", type=float, default=EFFICIENCY, help="of products, over the published peak")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if not 0 < options.efficiency <= 1:
        parser.error(f"--efficiency must be in (0, 1], got {options.efficiency}")
    found = list(rows(options.efficiency))
    table = Table(*found[0], title=f"MODELLED bounds, no GPU was used: bf16, r {RANK}, s {DIRECTIONS}, any dropout")
    for row in found:
        table.add_row(*(f"{v:.3f}" if isinstance(v, float) else str(v) for v in row.values()))
    Console(width=170).print(table)
    if options.out:
        write_csv(options.out / "layers_modelled.csv", found)


if __name__ == "__main__":
    main()
