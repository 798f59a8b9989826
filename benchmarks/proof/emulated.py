"""The sanitizer's place in the rehearsal: the emulator runs our kernels with every check on, and must find planted faults.

python -m benchmarks.proof.emulated
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from typing import Any

import torch

from loradash_kernels.testing import check_error_rule, make_case

from .ledger import Row
from .worker import Unit, failed, missing, passed, work

ARCHITECTURE = "sm_80"
# A kernel with a fault of each kind, which every tool of the emulator must name.
FAULTS = {
    "out-of-bounds": "x[threadIdx.x + 1] = 1;",
    "shared-race": "__shared__ float s[64]; s[threadIdx.x] = x[threadIdx.x]; x[threadIdx.x] = s[63 - threadIdx.x];",
    "uninitialised": "__shared__ float s[64]; if (threadIdx.x < 32) s[threadIdx.x] = 1; __syncthreads(); x[threadIdx.x] = s[threadIdx.x];",
    "deadlock": 'if (threadIdx.x < 32) asm volatile("bar.sync 1, 64;"); else asm volatile("bar.sync 2, 64;");',
}


def small_case() -> Any:
    return make_case(33, 40, 48, 4, 3, torch.bfloat16, dropout_p=0.1)


def triton_passes() -> Row:
    """Output and gradients, every kernel executed, within the error rule."""
    from tests.support import triton_emulation as emulation

    if reason := emulation.missing_tools():
        return missing(reason)
    case = small_case()
    check_error_rule(case, emulation.emulated_run(case, ARCHITECTURE))
    return passed("forward and backward without a fault, within the error rule")


def planted_write() -> Row:
    """Our own kernel, told of an output that is a row shorter than it is, writes that row out of bounds."""
    from tests.support import triton_emulation as emulation
    from tests.support.calls import outputs

    if reason := emulation.missing_tools():
        return missing(reason)
    from ptxsim import SimError

    from loradash_kernels.backends.triton.plan.forward import plan_forward
    from loradash_kernels.backends.triton.problem import KernelLaunch
    from loradash_kernels.backends.triton.strategies import Strategy

    case = small_case()
    out = outputs(case)
    y = out["y"]
    assert y is not None
    plan = plan_forward(emulation.problems_of(case, ARCHITECTURE, out)[0], Strategy("fused"))
    launches = [launch for launch in plan if isinstance(launch, KernelLaunch)]
    shorter: list[Any] = [dataclasses.replace(launch, args=shortened(launch.args, y)) for launch in launches]
    if len(launches) < len(plan) or not any(writes(launch.args, y) for launch in launches):
        return failed("no kernel of the plan writes y: nothing was planted")
    return expected_fault("out-of-bounds", SimError, lambda: emulation.run_plan(shorter, ARCHITECTURE))


def writes(args: dict[str, Any], y: torch.Tensor) -> set[str]:
    """The arguments that are y."""
    return {name for name, v in args.items() if isinstance(v, torch.Tensor) and v.data_ptr() == y.data_ptr()}


def shortened(args: dict[str, Any], y: torch.Tensor) -> dict[str, Any]:
    return {name: v[:-1] if name in writes(args, y) else v for name, v in args.items()}


def planted_fault(kind: str) -> Row:
    """A kernel of a line or two that does something wrong."""
    from tests.support import cuda_emulation as emulation

    if reason := emulation.missing_tools():
        return missing(reason)
    import numpy as np
    import ptxsim

    text = f'extern "C" __global__ void fault(float* x) {{ {FAULTS[kind]} }}'
    kernel = ptxsim.load(ptxsim.compile_cuda(text, arch=ARCHITECTURE))["fault"]
    # Where a race is planted, the words that are read before they are written are no news.
    options: dict[str, Any] = {"uninit": False} if kind == "shared-race" else {}
    return expected_fault(kind, ptxsim.SimError, lambda: kernel.launch(1, 64, [np.ones(64, np.float32)], **options))


def expected_fault(kind: str, error: type[Exception], run: Callable[[], object]) -> Row:
    """Passed where `run` raises an `error` of this kind."""
    try:
        run()
    except error as found:
        right = getattr(found, "kind", None) == kind
        return passed(str(found)) if right else failed(f"wanted {kind}, found {found}")
    return failed(f"{kind} was planted, and nothing was found")


def units() -> list[Unit]:
    return [
        ("planted: write beyond y", planted_write),
        *((f"planted: {kind}", lambda kind=kind: planted_fault(kind)) for kind in FAULTS),
        ("triton: forward and backward", triton_passes),
    ]


if __name__ == "__main__":
    sys.exit(work(units()))
