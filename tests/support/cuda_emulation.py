"""Runs the CUDA kernels in the emulator: the launches that the host code plans, on PTX that nvcc makes of the sources."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path
from typing import Any

import torch

from loradash_kernels.backends import extension
from loradash_kernels.random import draw_seed, dropout_threshold
from loradash_kernels.testing import Case

CSRC = Path(__file__).parents[2] / "csrc"
SOURCES = ("cuda/forward.cu", "cuda/backward.cu")
CARDS = {"sm_80": (108, 163 * 1024), "sm_86": (82, 99 * 1024)}  # processors, bytes of shared memory of a block


def missing_tools() -> str | None:
    """Why nothing can be compiled and emulated here, or None."""
    if extension.missing_reason:
        return extension.missing_reason
    if not shutil.which("nvcc") and not Path("/usr/local/cuda/bin/nvcc").exists():
        return "nvcc is not installed"
    return None if shutil.which("g++") else "the emulator is compiled with g++, which is not there"


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


def plan(case: Case, out: dict[str, torch.Tensor | None], direction: str, seed: torch.Tensor | None, base: torch.Tensor | None,
         card: tuple[int, int], tile: str) -> tuple[list[tuple], list[torch.Tensor]]:  # fmt: skip
    """Launches and the tensors that they use, the workspace last."""
    C, t = extension.compiled(), case.tensors
    weight = None if base is not None else t["weight"]
    names = ("lora_a", "lora_b", "dash_u", "dash_vt", "dash_sigma")
    adapters = [t[name] for name in names]
    options = (seed, case.scaling, dropout_threshold(case.dropout_p))
    if direction == "forward":
        bias = t["bias"] if base is None else None
        return C.cuda_plan_forward(case.x, weight, bias, *adapters, *options, base, out["y"], out["p"], card, tile)
    grads = [out[name] for name in ("x", "lora_a", "lora_b", "dash_sigma", "bias")]
    return C.cuda_plan_backward(case.dy, case.x, weight, *adapters, out["p"], *options, *grads, card, tile)


def emulate(launches: list[tuple], buffers: list[torch.Tensor], architecture: str, **options: Any) -> list[Any]:
    """Runs them in order, every check on, from a workspace of NaN; returns the counters of each."""
    if buffers[-1].numel():
        buffers[-1].fill_(255)
    found = kernels(architecture)
    return [
        found[name].launch(tuple(grid), threads, [params], shared=shared, buffers=buffers, **options)
        for name, grid, threads, shared, params in launches
    ]


def outputs(case: Case, base: bool = True) -> dict[str, torch.Tensor | None]:
    """y, P and every gradient, of NaN."""
    t, (m, k), n = case.tensors, case.x.shape, case.tensors["weight"].shape[0]
    rank, directions = t["lora_a"].shape[0], 0 if t["dash_sigma"] is None else t["dash_sigma"].shape[0]

    def poisoned(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.full(shape, float("nan"), dtype=dtype)

    return {
        "y": poisoned(m, n, dtype=case.x.dtype), "p": poisoned(m, rank + directions),
        "x": poisoned(m, k, dtype=case.x.dtype), "lora_a": poisoned(rank, k), "lora_b": poisoned(n, rank),
        "dash_sigma": poisoned(directions) if directions else None,
        "bias": poisoned(n) if t["bias"] is not None and base else None,
    }  # fmt: skip


def planned_names(case: Case, tile: str, architecture: str = "sm_80") -> list[list[str]]:
    """The kernels of a forward and of a backward call, in order."""
    out = outputs(case)
    directions = ("forward", "backward")
    return [[name for name, *_ in plan(case, out, d, None, None, CARDS[architecture], tile)[0]] for d in directions]


def emulated_run(
    case: Case, architecture: str = "sm_80", base: bool = True, tile: str = "", processors: int = 0,
    only: str | None = None, **options: Any,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """Output and gradients of a case (or `only` one of these), as `testing.run`; outputs are NaN before."""
    t = case.tensors
    torch.manual_seed(case.seed)
    seed = draw_seed() if case.dropout_p else None
    card = (processors or CARDS[architecture][0], CARDS[architecture][1])

    out = outputs(case, base)
    if only:
        out = {name: v if name in ("y", "p", only) else None for name, v in out.items()}
    product = None if base else torch.nn.functional.linear(case.x, t["weight"], t["bias"])
    reachable = [v for v in [*out.values(), seed, case.dy, case.x, product] if v is not None]
    for direction in ("forward", "backward"):
        launches, kept = plan(case, out, direction, seed, product, card, tile)
        emulate(launches, [*reachable, *kept], architecture, **options)
    if not base:  # the base layer's own gradients
        out["x"] += case.dy @ t["weight"]  # type: ignore[operator]
        if t["bias"] is not None:
            out["bias"] = case.dy.float().sum(0)
    del out["p"]
    return {name: v.to(case.tensors.get(name, case.x).dtype) for name, v in out.items() if v is not None}  # type: ignore[union-attr]
