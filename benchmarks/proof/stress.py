"""Kernels beside others on a busy device: results must have the same bits as on a quiet one, and no call may hang.

    python -m benchmarks.proof.stress [--device cuda] [--seconds-each 4]

One-launch kernels wait for each other within a launch: that they run beside other streams and another process is what is to
be shown. A second process multiplies matrices all the while; in this one, side streams do. A call that does not come back
is found by the proof's watchdog, which knows its name from the ledger.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from loradash_kernels import available_backends, dash_linear
from loradash_kernels.backends import tuning
from loradash_kernels.testing import Case, check_error_rule, make_case

from .ledger import Row
from .stage import ROOT
from .worker import Unit, failed, missing, passed, work

STREAMS = 3
GRADIENTS = ("x", "bias", "lora_a", "lora_b", "dash_sigma")


def case_for(device: str) -> Case:
    shape = (2048, 2048, 2048) if device == "cuda" else (64, 96, 80)
    return make_case(*shape, 8, 4, torch.bfloat16, dropout_p=0.05, device=device)


def step(case: Case, device: str, backend: str) -> Callable[[], dict[str, torch.Tensor]]:
    """A forward and a backward pass, whose results stay on the device."""
    tensors: dict[str, Any] = {
        n: t.detach().to(device).requires_grad_(n in GRADIENTS) for n, t in case.tensors.items() if t is not None
    }
    wanted, dy = {n: tensors[n] for n in GRADIENTS}, case.dy.to(device)
    call = functools.partial(dash_linear, **tensors, scaling=case.scaling, dropout_p=case.dropout_p, backend=backend)

    def run() -> dict[str, torch.Tensor]:
        torch.manual_seed(case.seed)
        y = call()
        return {"y": y.detach(), **dict(zip(wanted, torch.autograd.grad(y, [*wanted.values()], dy), strict=True))}

    return run


class Neighbour:
    """Another process that multiplies matrices on the device while `busy`, and is stopped otherwise: it starts once."""

    def __init__(self, device: str) -> None:
        argv = [sys.executable, "-m", "benchmarks.proof.stress", "--device", device, "--neighbour"]
        self.process = subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, text=True)

    def begin(self) -> None:
        """Waits until it is busy, and stops it. Raises RuntimeError where it never is."""
        assert self.process.stdout is not None
        if self.process.stdout.readline().strip() != "busy":
            raise RuntimeError(f"the second process did not begin, exit code {self.process.wait()}")
        self.process.send_signal(signal.SIGSTOP)

    @contextlib.contextmanager
    def busy(self) -> Iterator[None]:
        """Raises RuntimeError where it ended meanwhile."""
        self.process.send_signal(signal.SIGCONT)
        try:
            yield
        finally:
            self.process.send_signal(signal.SIGSTOP)
        if self.process.poll() is not None:
            raise RuntimeError(f"the second process ended early, exit code {self.process.returncode}")

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


def be_busy(device: str) -> None:
    """Until killed."""
    a = torch.randn(*(2 * [4096 if device == "cuda" else 512]), device=device)
    a @ a
    print("busy", flush=True)
    while True:
        for _ in range(10):
            a @ a
        if device == "cuda":
            torch.cuda.synchronize()


class Load:
    """Side streams of this process, each with products in its queue; nothing on the CPU."""

    def __init__(self, device: str) -> None:
        cuda = device == "cuda"
        self.streams = [torch.cuda.Stream() for _ in range(STREAMS)] if cuda else []
        self.matrices = [torch.randn(2048, 2048, device=device, dtype=torch.float16) for _ in self.streams]

    def add(self) -> None:
        for stream, matrix in zip(self.streams, self.matrices, strict=True):
            with torch.cuda.stream(stream):
                for _ in range(4):
                    matrix @ matrix


def same_bits(
    case: Case, device: str, backend: str, seconds: float, forced: dict[str, Any], neighbour: Neighbour
) -> Row:
    """Repeats a step for some seconds under load, and compares each result with that of a quiet device.

    Where a library takes part, its sums, y and dx, may be taken in another order beside other streams: those of the last
    repeat are held to the error rule. All others must have the same bits.
    """
    with tuning.forced(backend, **forced) if forced else contextlib.nullcontext():
        run = step(case, device, backend)
        quiet = {name: t.clone() for name, t in run().items()}
        ours = [name for name in quiet if forced or backend == "cpu" or name not in ("y", "x")]
        load, repeats, end = Load(device), 0, time.monotonic() + seconds
        with neighbour.busy():
            while time.monotonic() < end or repeats < 3:
                load.add()
                found = run()
                differs = [name for name in ours if not torch.equal(found[name], quiet[name])]
                repeats += 1
                if differs:
                    return failed(
                        f"{', '.join(differs)} differ from the quiet run in repeat {repeats}", repeats=repeats
                    )
        check_error_rule(case, found)
    return passed(f"the same bits in {repeats} repeats under load: {', '.join(ours)}", repeats=repeats)


def ways(backend: str, case: Case) -> list[tuple[str, dict[str, Any]]]:
    """What is forced on a backend: nothing, and each of its one-launch forwards, with a backward pass of our own sums."""
    found: list[tuple[str, dict[str, Any]]] = [("as it chooses", {})]
    if case.device.type != "cuda":
        return found
    from tests.support.matrix import candidates

    both = candidates(backend, case)
    own = next(c for c in both["backward"] if "library" not in str(c) and "one_launch" not in str(c))
    one_launch = [c for c in both["forward"] if "one_launch" in str(c)]
    return [*found, *((str(c), {"forward": c, "backward": own}) for c in one_launch)]


def units(device: str, seconds: float, neighbour: Neighbour) -> Iterator[Unit]:
    case = case_for(device)
    # The error rule assumes sums in float32.
    matmul = torch.backends.cuda.matmul
    matmul.allow_bf16_reduced_precision_reduction = matmul.allow_fp16_reduced_precision_reduction = False
    for backend in ("cuda", "triton") if device == "cuda" else ("cpu",):
        reason = available_backends()[backend]
        if reason:
            yield backend, functools.partial(missing, reason)
            continue
        for name, forced in ways(backend, case):
            yield f"{backend}, {name}", functools.partial(same_bits, case, device, backend, seconds, forced, neighbour)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--seconds-each", type=float, default=4)
    parser.add_argument("--neighbour", action="store_true", help="be the second process")
    options = parser.parse_args()
    if options.neighbour:
        be_busy(options.device)
    neighbour = Neighbour(options.device)
    try:
        neighbour.begin()
        return work(units(options.device, options.seconds_each, neighbour))
    finally:
        neighbour.end()


if __name__ == "__main__":
    sys.exit(main())
