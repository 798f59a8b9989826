"""A block exported, compiled ahead of time by AOTInductor, and run: with the operator, decomposed and merged."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import loradash
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export

from loradash_kernels import operator_decompositions

WIDTH = 32
_RUN = """
import sys, torch
if sys.argv[4] == "with":
    import loradash_kernels
program = torch._inductor.aoti_load_package(sys.argv[1])
torch.save(program(torch.load(sys.argv[2])), sys.argv[3])
"""


class Block(nn.Module):
    """A launched MLP with its norm."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        loradash.apply_dash(self, loradash.DashConfig(r=4, directions=4, target_modules=["up", "down"]))
        for layer in loradash.dash_layers(self).values():
            for tensor in (layer.lora_b, layer.dash_u, layer.dash_vt, layer.dash_sigma):
                nn.init.normal_(tensor, std=0.3)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


def _programs(block: Block) -> dict[str, ExportedProgram]:
    dynamic = {"x": {0: Dim("batch"), 1: Dim("length")}}

    def program() -> ExportedProgram:
        return export(block, (torch.randn(2, 8, WIDTH),), dynamic_shapes=dynamic)

    found = {"with the operator": program(), "decomposed": program().run_decompositions(operator_decompositions())}
    loradash.merge(block)
    found["merged"] = program()
    loradash.unmerge(block)
    return found


def _run(package: str, folder: Path, package_there: str) -> Tensor | None:
    """Its output in a process with this package or without; None where it does not load."""
    there = [package, folder / "x", folder / "y", package_there]
    done = subprocess.run([sys.executable, "-c", _RUN, *there], capture_output=True, text=True)
    if done.returncode:
        if "Could not find schema for loradash::" not in done.stderr:
            raise RuntimeError(done.stderr)
        return None
    return torch.load(folder / "y")


@torch.no_grad()
def rows() -> list[dict[str, Any]]:
    """A row a program: its gap to the eager block with this package loaded and without, for another batch and length."""
    block, x = Block().eval(), torch.randn(3, 5, WIDTH)
    expected, found = block(x), []
    with tempfile.TemporaryDirectory() as path:
        folder = Path(path)
        torch.save(x, folder / "x")
        for name, program in _programs(block).items():
            package = torch._inductor.aoti_compile_and_package(program, package_path=str(folder / "block.pt2"))
            gaps = {}
            for there in ("with", "without"):
                y = _run(package, folder, there)
                gaps[there] = "does not load" if y is None else f"{float((y - expected).abs().max()):.1e}"
            found.append({"program": name, "gap": gaps["with"], "gap without this package": gaps["without"]})
    return found
