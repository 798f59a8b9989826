"""How small may the tail be? Share of the true top 8 directions that the last n / f triplets hold, by f.

    python benchmarks/tail_rank.py --factors FILE

FILE as for prelaunch.py. Square layers of all-MiniLM-L6-v2; "rank" asks whether the true directions lie within the tail
at all, "found" what the randomized tail of that rank finds.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from prelaunch import minilm
from rich.console import Console
from rich.table import Table

from loradash_kernels import change_rates, direction_recall, task_specific_directions

FRACTIONS = (48, 24, 16, 12, 8, 6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--factors", type=Path, required=True)
    title, w, a, b, scaling = next(g for g in minilm(parser.parse_args().factors) if g[1].shape[-1] == g[1].shape[-2])
    n = w.shape[-1]
    truth = change_rates(w.double(), a.double(), b.double(), scaling=scaling, method="exact").rate.topk(8).indices
    table = Table("tail", "triplets", "within", "found", title=f"{title}: share of the true top 8")
    for fraction in FRACTIONS:
        rank = max(8, n // fraction)
        within = (truth >= n - rank).double().mean()
        found = task_specific_directions(w, a, b, 8, scaling=scaling, method="randomized", rank=rank).index
        share = direction_recall(found, truth).mean()
        table.add_row(f"n / {fraction}", str(rank), f"{within:.3f}", f"{share:.3f}")
    Console().print(table)
    print(f"spectrum: median of sigma_max / sigma_min {float(torch.linalg.cond(w).median()):.0f}")


if __name__ == "__main__":
    main()
