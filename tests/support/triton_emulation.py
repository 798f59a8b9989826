"""Compiles the launches of a plan for a GPU architecture and runs them in the emulator, without a GPU.

compiled = compile_launch(launch, "sm_80")          # what Triton's JIT would build for these arguments
stats = emulate(launch, compiled, seed=1)           # runs it on the launch's own CPU tensors, every check on
report = resources(compiled, target)                # registers, spills, shared memory, instructions
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from loradash_kernels.backends.triton.problem import KernelLaunch, Plan, Problem
from loradash_kernels.backends.triton.strategies import Strategy
from loradash_kernels.backends.triton.target import Target
from loradash_kernels.backends.triton.tiles import TARGETS
from loradash_kernels.testing import Case

from .calls import Outputs, Place, base_product, calls, drawn_seed, outputs, results

# Kernels are Triton's, so only their plans need it; a test file that imports this one is skipped with `missing_tools`.
if importlib.util.find_spec("triton"):
    from loradash_kernels.backends.triton.plan.backward import plan_backward
    from loradash_kernels.backends.triton.plan.forward import plan_forward

_POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.int32: "*i32",
}


def missing_tools() -> str | None:
    """Why nothing can be compiled and emulated here, or None."""
    if not importlib.util.find_spec("triton"):
        return "Triton is not installed"
    if not shutil.which("g++"):
        return "the emulator is compiled with g++, which is not there"
    return None


def _specialise(name: str, value: Any, launch: KernelLaunch) -> tuple[str, Any, bool]:
    """Triton type, constant (or None) and divisibility by 16 of an argument, as Triton's JIT decides them."""
    if isinstance(value, torch.Tensor):
        return _POINTERS[value.dtype], None, value.data_ptr() % 16 == 0
    if hasattr(value, "block_shape"):
        block = ",".join(map(str, value.block_shape))
        return f"tensordesc<{_POINTERS[value.base.dtype][1:]}[{block}]>", None, False
    if isinstance(value, float):
        return "fp32", None, False
    parameter = next(p for p in launch.kernel.params if p.name == name)
    if parameter.do_not_specialize:
        return "i32" if -(2**31) <= value < 2**31 else "i64", None, False
    return "i32" if -(2**31) <= value < 2**31 else "i64", 1 if value == 1 else None, value % 16 == 0


def problems_of(
    case: Case,
    architecture: str,
    out: Outputs | None = None,
    base: torch.Tensor | None = None,
    processors: int = 0,
    place: Place | None = None,
) -> tuple[Problem, Problem]:
    """What the backend would make of the forward and the backward call of a case, with the seed that `testing.run` draws.

    processors: of the imagined card, which sets the number of programs of persistent kernels and of splits of M.
    """
    target = TARGETS[architecture]
    if processors:
        target = replace(target, processors=processors)
    found = calls(case, outputs(case) if out is None else out, drawn_seed(case, place), base)
    return Problem(found[0], target), Problem(found[1], target)


def emulated_run(
    case: Case,
    architecture: str,
    forward: Strategy | None = None,
    backward: Strategy | None = None,
    base: bool = True,
    processors: int = 0,
    place: Place | None = None,
    **options: Any,
) -> dict[str, torch.Tensor]:
    """Output and gradients of a case, every kernel executed from its PTX; outputs are NaN before. As `testing.run`, but that
    the product is a tile's and not the library's, unless told: that one is nothing to emulate."""
    out = outputs(case, base)
    one, two = problems_of(case, architecture, out, None if base else base_product(case), processors, place)
    forward, backward = forward or Strategy("fused"), backward or Strategy("fused")
    run_plan([*plan_forward(one, forward), *plan_backward(two, backward)], architecture, **options)
    return results(case, out, base)


def run_plan(plan: Plan, architecture: str, **options: Any) -> None:
    for launch in plan:
        if isinstance(launch, KernelLaunch):
            emulate(launch, compile_launch(launch, architecture), **options)
        else:
            launch.run()


def compile_launch(launch: KernelLaunch, architecture: str) -> Any:
    """triton.compile of a launch for "sm_80", "gfx942", ...: its tensors may be on any device, or on none (meta)."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature: dict[str, str] = {}
    constants = dict(launch.constants)
    attributes = {}
    for index, name in enumerate(launch.kernel.arg_names):
        if name in launch.constants:
            signature[name] = "constexpr"
            continue
        value = launch.args[name]
        kind, constant, divisible = ("constexpr", None, False) if value is None else _specialise(name, value, launch)
        if value is None or constant is not None:
            signature[name], constants[name] = "constexpr", constant
        else:
            signature[name] = kind
            if divisible:
                attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)
    hip = architecture.startswith("gfx")
    target = GPUTarget("hip", architecture, 64) if hip else GPUTarget("cuda", int(architecture[3:]), 32)
    return triton.compile(
        source, target=target, options={"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    )


def emulate(launch: KernelLaunch, compiled: Any, **options: Any) -> Any:
    """Runs a compiled launch on its own CPU tensors; returns the emulator's counters, raises on any fault."""
    import ptxsim

    constants = compiled.src.constants
    known = {compiled.src.fn.arg_names[path[0]] if isinstance(path, tuple) else path for path in constants}
    args = [launch.args[name] for name in launch.kernel.arg_names if name not in known]
    return ptxsim.run_triton(compiled, launch.grid, args, **options)


@dataclass(frozen=True)
class Resources:
    """What the assembler made of a kernel, per thread and per block."""

    registers: int
    spilled: int
    shared: int
    # The target's own, and mma.sync, which newer cards keep for tiles of fewer than 64 rows.
    matrix_instructions: int
    warp_instructions: int

    def problems(self, target: Target) -> list[str]:
        found = []
        if self.spilled:
            found.append(f"spills {self.spilled} bytes")
        if self.shared > target.shared_limit:
            found.append(f"takes {self.shared} bytes of shared memory, the limit is {target.shared_limit}")
        return found


def resources(compiled: Any, target: Target) -> Resources:
    """What a kernel compiled for `target` takes, read from its cubin or its code object's assembly."""
    shared = compiled.metadata.shared
    if target.name.startswith("gfx"):
        text = compiled.asm["amdgcn"]

        def number(key: str) -> int:
            found = re.search(rf"{key}:?\s+(\d+)", text)
            return int(found.group(1)) if found else 0

        return Resources(
            number(r"\.vgpr_count"), 4 * number(r"\.vgpr_spill_count"), shared, text.count(target.matrix_instruction), 0
        )
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = subprocess.run(
            [tools / "cuobjdump", "--dump-resource-usage", cubin.name], capture_output=True, text=True, check=True
        ).stdout
        sass = subprocess.run([tools / "nvdisasm", "-c", cubin.name], capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.search(rf"{key}:(\d+)", usage).group(1)) for key in ("REG", "STACK"))  # type: ignore[union-attr]
    local = len(re.findall(r"\b(?:STL|LDL)\b", sass))
    warp_level = len(re.findall(r"\bHMMA\b", sass))
    return Resources(registers, stack if local else 0, shared, sass.count(f" {target.matrix_instruction}"), warp_level)
