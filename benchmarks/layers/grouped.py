"""Prints what three projections that share x cost as a group, as three layers, with PEFT and frozen: time and saved bytes.

    OMP_NUM_THREADS=1 python -m benchmarks.layers.grouped [--rounds 40] [--out benchmarks/results]

Forward and backward, three weights N x N and one x (M, N) that requires a gradient. One thread, variants in turn in short
blocks, medians of the processor's time, which does not count when others had the core; ratios within one run are what to
quote. The load of the machine stands in every line.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from loradash import group_projections
from loradash.config import DashConfig
from loradash.state import STATE, DashState
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.layers.variants import DTYPES, FROZEN, OURS, PEFT, Case, make_case, make_inputs
from benchmarks.support.measure import environment, interleaved, write_csv

SHAPES = ((512, 1024, 1024), (384, 2048, 2048))
MEMBERS = 3
GROUP = "ours, grouped"
VARIANTS = (FROZEN, PEFT, OURS, GROUP)


class Projections(nn.Module):
    """Layers that read one x; their outputs lie side by side in a list."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [layer(x) for layer in self.layers]


class GroupCase(Case):
    """A case of several outputs, each with its gradient."""

    def step(self) -> None:
        torch.autograd.backward(self.layer(self.x), [self.dy] * MEMBERS)
        self.drop_gradients()


def make(name: str, shape: tuple[int, int, int], dtype: torch.dtype) -> GroupCase:
    """One variant around three weights, which are the same for all variants."""
    parts = []
    for i in range(MEMBERS):
        inputs = make_inputs(shape, dtype)
        # make_inputs draws the same weight in every call.
        inputs.weight = inputs.weight.roll(i, 0)
        parts.append(make_case(OURS if name == GROUP else name, inputs))
    model = Projections([case.layer for case in parts])
    if name == GROUP:
        setattr(model, STATE, DashState(DashConfig()))
        group_projections(model, [[f"layers.{i}" for i in range(MEMBERS)]])
    return GroupCase(model, parts[0].x, parts[0].dy)


def rows(rounds: int) -> list[dict[str, Any]]:
    """One row a dtype, shape and variant."""
    found = []
    for dtype, shape in tqdm([(d, s) for d in DTYPES for s in SHAPES], desc="groups", file=sys.stderr):
        cases = {name: make(name, shape, DTYPES[dtype]) for name in VARIANTS}
        seconds = interleaved(
            {name: case.step for name, case in cases.items()}, rounds, 2, warm=1, clock=time.process_time
        )
        load = os.getloadavg()[0]
        for name, case in cases.items():
            found.append(
                {
                    "dtype": dtype,
                    "shape": f"{MEMBERS} x " + "x".join(map(str, shape)),
                    "variant": name,
                    "forward+backward ms": f"{1e3 * seconds[name]:.2f}",
                    "over frozen": f"{seconds[name] / seconds[FROZEN]:.3f}",
                    "over three layers of ours": f"{seconds[name] / seconds[OURS]:.3f}",
                    "saved bytes": case.saved_bytes(),
                    "load": f"{load:.1f}",
                }
            )
    return found


def table(found: list[dict[str, Any]]) -> str:
    """The rows as a page."""
    columns = [c for c in found[0] if c != "forward+backward ms"]
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(str(row[c]) for c in columns) + " |" for row in found]
    about = ", ".join(f"{key} {value}" for key, value in environment().items())
    return f"Three projections of one x, forward and backward, dropout 0.05, r 16, s 8; {about}.\n\n" + "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--out", type=Path, help="a folder for grouped.csv and grouped.md")
    arguments = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    found = rows(arguments.rounds)
    text = table(found)
    print(text)
    if arguments.out:
        write_csv(arguments.out / "grouped.csv", found)
        (arguments.out / "grouped.md").write_text(text + "\n")


if __name__ == "__main__":
    main()
