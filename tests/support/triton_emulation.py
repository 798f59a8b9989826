"""Compiles the launches of a plan for a GPU architecture and runs them in the emulator, without a GPU.

compiled = compile_launch(launch, "sm_80")          # what Triton's JIT would build for these arguments
stats = emulate(launch, compiled, seed=1)           # runs it on the launch's own CPU tensors, every check on
report = resources(compiled, target)                # registers, spills, shared memory, instructions
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from loradash_kernels.backends.triton import tiles
from loradash_kernels.backends.triton.plan import plan_backward, plan_forward
from loradash_kernels.backends.triton.problem import Launch, Problem, Strategy
from loradash_kernels.backends.triton.target import Target
from loradash_kernels.random import draw_seed, dropout_threshold
from loradash_kernels.testing import Case

_POINTERS = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.int64: "*i64", torch.int32: "*i32",
}  # fmt: skip


def missing_tools() -> str | None:
    """Why nothing can be compiled and emulated here, or None."""
    try:
        import triton  # noqa: F401
    except ImportError:
        return "Triton is not installed"
    if not shutil.which("g++"):
        return "the emulator is compiled with g++, which is not there"
    return None


def _specialise(name: str, value: Any, launch: Launch) -> tuple[str, Any, bool]:
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


def problem_of(case: Case, architecture: str) -> Problem:
    """What the backend would make of `dash_linear` on this case, with the seed that `testing.run` draws."""
    torch.manual_seed(case.seed)
    seed = draw_seed() if case.dropout_p else None
    t = case.tensors
    adapters = (t[name] for name in ("lora_a", "lora_b", "dash_u", "dash_vt", "dash_sigma"))
    threshold = dropout_threshold(case.dropout_p)
    return Problem(case.x, t["weight"], *adapters, seed, case.scaling, threshold, tiles.TARGETS[architecture])


def emulated_run(
    case: Case, architecture: str, forward: Strategy | None = None, backward: Strategy | None = None, base: bool = True,
    processors: int = 0, **options: Any,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """Output and gradients of a case, every kernel executed from its PTX; outputs are NaN before. As `testing.run`.

    processors: of the imagined card, which sets the number of programs of persistent kernels and of splits of M.
    """
    q = problem_of(case, architecture)
    if processors:
        q.target = replace(q.target, processors=processors)
    t = case.tensors
    bias, product = t["bias"], None
    if not base:
        product, bias, q.weight = torch.nn.functional.linear(case.x, q.weight, bias), None, None

    def poisoned(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.full(shape, float("nan"), dtype=dtype)

    y, p = poisoned(q.m, q.n, dtype=case.x.dtype), poisoned(q.m, q.width)
    grads = {
        "x": poisoned(q.m, q.k, dtype=case.x.dtype), "lora_a": poisoned(q.rank, q.k), "lora_b": poisoned(q.n, q.rank),
        "dash_sigma": poisoned(q.directions) if q.directions else None,
        "bias": poisoned(q.n) if t["bias"] is not None else None,
    }  # fmt: skip
    for launch in [
        *plan_forward(q, bias, product, y, p, forward), *plan_backward(q, case.dy, p, *grads.values(), backward),
    ]:  # fmt: skip
        if isinstance(launch, Launch):
            emulate(launch, compile_launch(launch, architecture), **options)
        else:
            launch.run()
    if not base:  # the base layer's own gradient
        grads["x"] += case.dy @ t["weight"]
    found = {"y": y, **{name: grad for name, grad in grads.items() if grad is not None}}
    return {name: value.to(case.tensors.get(name, y).dtype) for name, value in found.items()}  # type: ignore[union-attr]


def compile_launch(launch: Launch, architecture: str) -> Any:
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


def emulate(launch: Launch, compiled: Any, **options: Any) -> Any:
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
    matrix_instructions: int  # the target's own
    warp_instructions: int  # mma.sync, which newer cards keep for tiles of fewer than 64 rows

    def problems(self, target: Target) -> list[str]:
        found = []
        if self.spilled:
            found.append(f"spills {self.spilled} bytes")
        if self.shared > target.shared_limit:
            found.append(f"takes {self.shared} bytes of shared memory, the limit is {target.shared_limit}")
        return found


def resources(compiled: Any, target: Target) -> Resources:
    """Of a kernel compiled by Triton for `target`, from its cubin or its code object's assembly."""
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
