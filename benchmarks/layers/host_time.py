"""How long Python takes for one step of a layer by the Triton backend: forward and backward, up to the driver's own call.

    python -m benchmarks.layers.host_time [--blocks 40] [--steps 50]

No GPU is needed. Triton is given a driver that compiles for sm_80 and whose launcher does nothing, and tensors on the CPU
pass for a card's: what is timed is argument checks, autograd, allocation, plans and Triton's part of a launch. Not in it: the
launcher's C code and the CUDA driver (about 2 us a launch on a card), `torch.cuda.device` and the vendor library's
own host time, whose products are run on tiny matrices here and shown apart.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import random
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch

import loradash_kernels as lk
from loradash_kernels.backends import tuning
from loradash_kernels.backends.triton import backend, prepared
from loradash_kernels.backends.triton.strategies import Strategy
from loradash_kernels.testing import make_case
from tests.support.pretended_driver import nothing, pretended_card

M, K, N, RANK, DIRECTIONS = 64, 64, 64, 16, 8


class Step:
    """One forward and backward pass of a layer: bf16, fp32 adapters, bias, dropout 0.05."""

    def __init__(self) -> None:
        case = make_case(M, K, N, RANK, DIRECTIONS, torch.bfloat16, adapter_dtype=torch.float32, dropout_p=0.05)
        self.tensors = {
            name: t.requires_grad_(name in ("x", "lora_a", "lora_b", "dash_sigma", "bias"))
            for name, t in case.tensors.items()
            if t is not None
        }
        self.dy = case.dy

    def forward(self) -> torch.Tensor:
        x, weight, bias = (self.tensors[name] for name in ("x", "weight", "bias"))
        adapters = {k: v for k, v in self.tensors.items() if k not in ("x", "weight", "bias")}
        return lk.dash_linear(x, weight, bias, **adapters, scaling=2.0, dropout_p=0.05, backend="triton")

    def backward(self, y: torch.Tensor) -> None:
        y.backward(self.dy)
        for t in self.tensors.values():
            t.grad = None


def _strategy(kind: str) -> contextlib.AbstractContextManager[Any]:
    return tuning.forced("triton", forward=Strategy(kind), backward=Strategy(kind))


@contextlib.contextmanager
def _without_products() -> Iterator[None]:
    with mock.patch.object(prepared, "multiply", nothing):
        yield


@contextlib.contextmanager
def _planned_anew(kind: str) -> Iterator[None]:
    """Every call makes its plan, and Triton specialises every launch."""
    from loradash_kernels.backends.triton.plan.backward import plan_backward
    from loradash_kernels.backends.triton.plan.forward import plan_forward

    def run(plan: Callable[..., Any], call: Any) -> None:
        for launch in plan(backend._problem(call), Strategy(kind)):
            launch.run()

    passes = {"forward": plan_forward, "backward": plan_backward}
    with mock.patch.multiple(backend, **{name: functools.partial(run, plan) for name, plan in passes.items()}):
        yield


@contextlib.contextmanager
def _no_kernels() -> Iterator[None]:
    with mock.patch.multiple(backend, forward=nothing, backward=nothing):
        yield


ARMS: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
    "fused, planned and specialised anew in every call": lambda: _planned_anew("fused"),
    "library, planned and specialised anew in every call": lambda: _planned_anew("library"),
    "fused": lambda: _strategy("fused"),
    "by default (library)": contextlib.nullcontext,
    "by default, the library's products left out": _without_products,
    "operators alone, no backend": _no_kernels,
}


def measure(blocks: int, steps: int) -> dict[str, tuple[float, float]]:
    """Median microseconds of forward and of backward, by arm: blocks of every arm in turn, in random order."""
    step, order = Step(), random.Random(0)
    times: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in ARMS}
    with pretended_card():
        for context in ARMS.values():
            with context():
                for _ in range(3):
                    step.backward(step.forward())
        for _ in range(blocks):
            for name in order.sample(list(ARMS), len(ARMS)):
                with ARMS[name]():
                    _block(step, steps, *times[name])
    return {name: (statistics.median(f), statistics.median(b)) for name, (f, b) in times.items()}


def _block(step: Step, steps: int, forward: list[float], backward: list[float]) -> None:
    for _ in range(steps):
        start = time.perf_counter()
        y = step.forward()
        middle = time.perf_counter()
        step.backward(y)
        end = time.perf_counter()
        forward.append(1e6 * (middle - start))
        backward.append(1e6 * (end - middle))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=40)
    parser.add_argument("--steps", type=int, default=50)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    import triton

    print(f"Python's microseconds a step, Triton {triton.__version__}, torch {torch.__version__}, median")
    print(f"{'forward':>10} {'backward':>10} {'step':>10}")
    for name, (forward, backward) in measure(arguments.blocks, arguments.steps).items():
        print(f"{forward:10.1f} {backward:10.1f} {forward + backward:10.1f}  {name}")


if __name__ == "__main__":
    main()
