"""The Triton backend: fused kernels for every GPU that Triton compiles to. Importing this needs no Triton."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Hashable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...calls import KERNEL_DTYPES, BackwardCall, ForwardCall
from ...notices import warn_once
from .. import cards, tuning
from .prepared import PLANS, PreparedPlan, look, without_memory
from .problem import C, Problem
from .strategies import Strategy, candidates
from .target import MINIMUM, Target, Version, triton_version
from .tiles import MAX_WIDTH, TARGETS, nearest

name = "triton"


@functools.cache
def missing() -> str | None:
    """Why Triton cannot be used here at all, or None."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; `pip install triton` (or a CUDA or ROCm build of PyTorch, which brings it)"
    import triton

    if triton_version() < MINIMUM:
        return f"Triton {triton.__version__} is too old; {_dotted(MINIMUM)} or newer is needed"
    if interpreted():
        return None
    if not torch.cuda.is_available():
        return "PyTorch sees no GPU"
    return None


def interpreted() -> bool:
    """Does TRITON_INTERPRET=1 ask for Triton's interpreter, which runs kernels on the CPU?"""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def refuses(x: Tensor, width: int = 0) -> str | None:
    """Why a call with this x and R = `width` cannot run, or None."""
    if x.device.type == "cpu" and not interpreted():
        return "x is on the CPU (TRITON_INTERPRET=1 would run the kernels there, slowly)"
    if x.device.type not in ("cpu", "cuda"):
        return f"x is on {x.device}"
    if x.dtype not in KERNEL_DTYPES:
        return f"x is {x.dtype}, the Triton kernels take float32, bfloat16 and float16"
    if width > MAX_WIDTH:
        return f"r + s is {width}, the Triton kernels take at most {MAX_WIDTH}"
    target = target_of(x.device)
    if target is None:
        return f"{architecture_of(x.device)} has no tile table; known are {', '.join(TARGETS)}"
    if triton_version() < target.triton:
        return f"Triton {_dotted(triton_version())} does not compile for {target.name}; {_dotted(target.triton)} or newer does"
    return None


def _dotted(version: Version) -> str:
    return ".".join(map(str, version))


def architecture_of(device: torch.device) -> str:
    """As `cards` names it; the interpreter takes the tiles of sm_80."""
    return "sm_80" if device.type == "cpu" else cards.architecture_of(device)


def target_of(device: torch.device) -> Target | None:
    """The target whose tiles a device takes: its own, or for an unlisted one the nearest older that is safe; or None."""
    architecture = architecture_of(device)
    return TARGETS.get(architecture) or _nearest(architecture, _shared_limit(device))


_nearest = functools.cache(nearest)


@functools.cache
def _shared_limit(device: torch.device) -> int | None:
    """The bytes of shared memory that a block may take, where this PyTorch tells."""
    found = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    return getattr(found, "shared_memory_per_block_optin", None)


def _target_in_use(device: torch.device) -> Target:
    target, architecture = target_of(device), architecture_of(device)
    assert target is not None, "a device that `refuses` lets through has a target"
    if target.name != architecture:
        warn_once(
            f"Triton's tiles for {architecture} are a guess, those of {target.name}: they may be slow or fail to compile. "
            "LORADASH_TUNE=1 measures them; backend= asks for another backend"
        )
    return target


def _problem(call: C, memory: str | None = None) -> Problem[C]:
    x = call.x
    target = _target_in_use(x.device)
    if x.device.type == "cuda":
        target = replace(target, processors=torch.cuda.get_device_properties(x.device).multi_processor_count)
    return Problem(call, target, _tf32_wanted(x), memory)


def _tf32_wanted(x: Tensor) -> bool:
    return x.dtype == torch.float32 and x.is_cuda and _tf32_allowed()


def _tf32_allowed() -> bool:
    """By the newer of PyTorch's two settings, which does not let the older one be read once it was set."""
    matmul = torch.backends.cuda.matmul
    return matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32


def forward(call: ForwardCall) -> None:
    _run(call)


def backward(call: BackwardCall) -> None:
    _run(call)


def _run(call: C) -> None:
    x = call.x
    # Triton launches on the current device: it becomes that of x.
    if x.is_cuda and x.get_device() != torch.cuda.current_device():
        with torch.cuda.device(x.device):
            _run_here(call)
    else:
        _run_here(call)


def _run_here(call: C) -> None:
    traits: list[Any]
    addresses: list[int]
    given, traits, addresses = look(call)
    x, tf32 = given.x, _tf32_wanted(given.x)
    problem: Hashable = (architecture_of(x.device), x.get_device(), tf32, *traits)

    def run(strategy: Strategy | None) -> None:
        key = (strategy, problem)
        plan = PLANS.find(key) or PLANS.keep(key, _prepare(given, strategy))
        plan.run(given, addresses)

    precision = "tf32" if tf32 and _target_in_use(x.device).tf32 else "ieee"
    run(tuning.choose(name, given, lambda: candidates(_problem(given)), run, precision))


def _prepare(call: C, strategy: Strategy | None) -> PreparedPlan:
    # Only here is Triton imported: its kernels stand in the plans.
    from .plan.backward import plan_backward
    from .plan.forward import plan_forward

    problem: Problem[Any] = _problem(without_memory(call), "meta")
    return PreparedPlan(problem, (plan_forward if isinstance(call, ForwardCall) else plan_backward)(problem, strategy))
