"""Runs the CUDA kernels in the emulator: the launches that the host code plans, on PTX that nvcc makes of the sources."""

from __future__ import annotations

import functools
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

from loradash_kernels.backends import extension
from loradash_kernels.testing import Case

from .calls import Outputs, Place, base_product, calls, drawn_seed, outputs, results

CSRC = Path(__file__).parents[2] / "csrc"
PASSES = ("forward", "backward")
SOURCES = ("cuda/forward.cu", "cuda/backward.cu")
# Processors, and bytes of shared memory that a block may take.
CARDS = {"sm_80": (108, 163 * 1024), "sm_86": (82, 99 * 1024)}


def missing_tools() -> str | None:
    """Why nothing can be compiled and emulated here, or None."""
    if extension.missing_reason:
        return extension.missing_reason
    if not shutil.which("nvcc") and not Path("/usr/local/cuda/bin/nvcc").exists():
        return "nvcc is not installed"
    return None if shutil.which("g++") else "the emulator is compiled with g++, which is not there"


@functools.cache
def known_architectures() -> set[str]:
    """What the toolkit that is here compiles for."""
    from ptxsim.toolchain import tool

    done = subprocess.run([tool("nvcc"), "--list-gpu-code"], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@functools.cache
def ptx(source: str, architecture: str) -> str:
    import ptxsim

    return ptxsim.compile_cuda(str(CSRC / source), arch=architecture, includes=[str(CSRC)])


@functools.cache
def kernels(architecture: str) -> dict[str, Any]:
    """Every entry point by name."""
    import ptxsim

    found = {}
    for source in SOURCES:
        module = ptxsim.load(ptx(source, architecture))
        found |= {name: module[name] for name in module}
    return found


def plan(
    case: Case,
    out: Outputs,
    pass_: str,
    seed: torch.Tensor | None,
    base: torch.Tensor | None,
    card: tuple[int, int],
    tile: str,
    weight: bool = True,
) -> tuple[list[tuple], list[torch.Tensor]]:
    """Launches of a pass and the tensors that they use, the workspace last. Without `weight` the low-rank terms are left, and
    the bias: what goes before a library's product."""
    forward, backward = calls(case, out, seed, base)
    if not weight:
        forward, backward = forward._replace(weight=None), backward._replace(weight=None)
    if pass_ == "forward":
        return extension.compiled().cuda_plan_forward(*forward, card, tile)
    return extension.compiled().cuda_plan_backward(*backward, card, tile)


def emulate(launches: list[tuple], buffers: list[torch.Tensor], architecture: str, **options: Any) -> list[Any]:
    """Runs them in order, every check on, from a workspace of NaN; returns the counters of each."""
    if buffers[-1].numel():
        buffers[-1].fill_(255)
    found = kernels(architecture)
    return [
        found[name].launch(tuple(grid), threads, [params], shared=shared, buffers=buffers, **options)
        for name, grid, threads, shared, params in launches
    ]


def planned_names(case: Case, tile: str, architecture: str = "sm_80") -> list[list[str]]:
    """The kernels of a forward and of a backward call, in order."""
    out = outputs(case)
    return [[name for name, *_ in plan(case, out, p, None, None, CARDS[architecture], tile)[0]] for p in PASSES]


def emulated_run(
    case: Case,
    architecture: str = "sm_80",
    base: bool = True,
    tile: str = "",
    processors: int = 0,
    only: str | None = None,
    weight: bool = True,
    place: Place | None = None,
    **options: Any,
) -> dict[str, torch.Tensor]:
    """Output and gradients of a case (or `only` one of these), as `testing.run`; outputs are NaN before."""
    seed, product = drawn_seed(case, place), None if base else base_product(case)
    card = (processors or CARDS[architecture][0], CARDS[architecture][1])
    out = outputs(case, base)
    if only:
        out = {name: v if name in ("y", "p", only) else None for name, v in out.items()}
    reachable = [v for v in [*out.values(), seed, case.dy, case.x, product] if v is not None]
    for pass_ in PASSES:
        launches, kept = plan(case, out, pass_, seed, product, card, tile, weight)
        emulate(launches, [*reachable, *kept], architecture, **options)
    return results(case, out, base)
