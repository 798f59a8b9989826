"""The Triton kernels at small ragged shapes, every one of them once, against float64. Made for compute-sanitizer.

    compute-sanitizer --tool memcheck python examples/triton_check.py [--list] [--only TEXT] [--plant write]

--list         names the cases, and runs nothing
--only TEXT    takes the cases whose names contain TEXT
--plant write  runs a kernel whose mask lets one element too many through: memcheck must find the write. Without it nothing
               notices, and the exit code is 0.

Every tensor is an allocation of its own size, so that memcheck sees where it ends. TRITON_INTERPRET=1 rehearses it on the
CPU. Exit codes: 0, all is right; 1, a result is wrong, or a kernel was never launched; 2, the arguments are; 3, there is
neither a GPU nor the interpreter.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any
from unittest import mock

# PyTorch's cache would hand out parts of larger allocations. It is decided before CUDA is used.
os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"

import torch
import triton
import triton.language as tl
from triton.runtime.jit import KernelInterface

from loradash_kernels.backends import tuning
from loradash_kernels.backends.triton import backend, prelaunch
from loradash_kernels.backends.triton.kernels import backward, descriptor, forward
from loradash_kernels.backends.triton.plan import backward as plan_backward
from loradash_kernels.backends.triton.problem import KernelLaunch, Problem
from loradash_kernels.backends.triton.strategies import Strategy, candidates
from loradash_kernels.calls import ForwardCall
from loradash_kernels.testing import check_error_rule, make_case, run


def kernels_of(*modules: ModuleType) -> set[str]:
    """The kernels that modules name or define, without the helpers of kernels and the functions of other modules."""
    found = [value for module in modules for value in vars(module).values() if isinstance(value, KernelInterface)]
    return {kernel.fn.__name__ for kernel in found if kernel.fn.__module__ not in HELPERS} - HELPERS


HELPERS = {"loradash_kernels.backends.triton.kernels.common"}
HELPERS |= {name for module in (forward, backward, descriptor) for name in vars(module) if name.startswith("_")}
# A card without tensor descriptors has no use for some.
DESCRIPTORS = kernels_of(descriptor)
KERNELS = kernels_of(forward, backward, prelaunch)
# The interpreter's products of bf16 are wrong.
DTYPES = (torch.float32, torch.float16) if backend.interpreted() else (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Check:
    """A case by name, and what runs it: raises AssertionError where a result is wrong."""

    name: str
    run: Callable[[], None]


def layer(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    dropout: float,
    strategies: tuple[str, str],
    base: bool,
    device: str,
) -> Callable[[], None]:
    def check() -> None:
        case = make_case(*shape, dtype, adapter_dtype=torch.float32, dropout_p=dropout, device=device)
        one, two = map(Strategy, strategies)
        with tuning.forced("triton", forward=one, backward=two):
            check_error_rule(case, run(case, "triton", base))

    return check


def in_rounds(check: Callable[[], None]) -> Callable[[], None]:
    """The same where partial sums of G may take next to nothing, so that dy is taken in rounds."""

    def limited() -> None:
        with mock.patch.object(plan_backward, "_G_BYTES", 1):
            check()

    return limited


def takes_descriptors(device: str) -> bool:
    """Are kernels on tensor descriptors to be had on this device?"""
    case = make_case(64, 64, 64, 8, 8, torch.float16, device=device)
    t, y, p = case.tensors, torch.empty_like(case.dy), torch.empty(64, 16, device=device)
    adapters = (t["lora_a"], t["lora_b"], t["dash_u"], t["dash_vt"], t["dash_sigma"])
    call = ForwardCall(case.x, t["weight"], None, *adapters, None, 1.0, 0, None, y, p)
    target = backend.target_of(case.x.device)
    return target is not None and any(found.kind == "descriptors" for found in candidates(Problem(call, target)))


def layers(device: str) -> Iterator[Check]:
    """The operator: rows of whole chunks and not, narrow ranks and wide, every strategy, with and without dropout and base."""
    aligned, ragged, wide = (48, 64, 80, 16, 8), (37, 50, 70, 4, 3), (40, 48, 56, 56, 8)
    kinds = {"fused": ("fused", "fused"), "one-launch": ("one_launch", "fused"), "library": ("library", "library")}
    if takes_descriptors(device):
        kinds["descriptors"] = ("descriptors", "descriptors")
    for dtype in DTYPES:
        kind = str(dtype).removeprefix("torch.")
        for name, strategies in kinds.items():
            for shape_name, shape in (("aligned", aligned), ("ragged", ragged)):
                if name == "descriptors" and (shape is ragged or dtype == torch.float32):
                    continue
                yield Check(f"{name}-{shape_name}-{kind}", layer(shape, dtype, 0.3, strategies, True, device))
        yield Check(f"whole-{kind}", layer(ragged, dtype, 0.0, kinds["fused"], True, device))
        yield Check(f"on-a-base-{kind}", layer(ragged, dtype, 0.3, kinds["fused"], False, device))
        yield Check(f"wide-{kind}", layer(wide, dtype, 0.3, kinds["fused"], True, device))
    yield Check("rounds", in_rounds(layer((40, 48, 600, 16, 8), torch.float16, 0.3, kinds["fused"], True, device)))


def prelaunch_kernels(device: str) -> Iterator[Check]:
    """The kernels of the pre-launch phase, on two layers at once."""
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    def sketch() -> None:
        seed = torch.tensor([5, 7], device=device)
        w, gaussian = normal(2, 70, 37), prelaunch.sketch(torch.eye(37, device=device)[None], seed, 19)
        torch.testing.assert_close(prelaunch.sketch(w, seed, 19), w @ gaussian, atol=1e-4, rtol=1e-4)

    def jacobi() -> None:
        x = normal(2, 13, 37)
        sigma, _, converged = prelaunch.jacobi(x)
        assert bool(converged.all())
        torch.testing.assert_close(sigma, torch.linalg.svdvals(x.double()).float(), atol=1e-4, rtol=1e-4)

    def rates() -> None:
        u, v, b, at = normal(2, 70, 21), normal(2, 37, 21), normal(2, 70, 4), normal(2, 37, 4)
        sigma = normal(2, 21).abs() + 0.5
        rate, index = prelaunch.rates(u, v, sigma, b, at, 5, 2.0, 1e-6, False)
        full = 2.0 * ((u.mT @ b) * (v.mT @ at)).sum(-1).abs() / (sigma + 1e-6)
        best = full.topk(5)
        assert torch.equal(index, best.indices)
        torch.testing.assert_close(rate, best.values, atol=1e-3, rtol=1e-3)

    return (Check(f"prelaunch-{f.__name__}", f) for f in (sketch, jacobi, rates))


@triton.jit
def planted(out, count, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out + at, 1.0, mask=at <= count)


def plant(device: str) -> None:
    """Writes one element past `count`: on a card past its memory, here where nothing else lies."""
    count = 1000
    out = torch.zeros(count + (device == "cpu"), device=device)
    planted[(1,)](out, count, BLOCK=1024)
    print(f"planted a write of element {count} of {count}; compute-sanitizer must find it")


def check_all(checks: list[Check], every: bool, device: str) -> int:
    """Runs them and returns how many are wrong; where it is `every` case, kernels that none launched count too."""
    launched: set[str] = set()
    plain = KernelLaunch.run

    def recorded(launch: KernelLaunch) -> Any:
        launched.add(launch.kernel.__name__)
        return plain(launch)

    bad = 0
    with mock.patch.object(KernelLaunch, "run", recorded):
        for check in checks:
            try:
                check.run()
                print(f"ok {check.name}", flush=True)
            except AssertionError as error:
                bad += 1
                print(f"WRONG {check.name}: {str(error).strip()[:500]}", flush=True)
    wanted = KERNELS | (DESCRIPTORS if takes_descriptors(device) else set())
    never = sorted(wanted - launched) if every else []
    for name in never:
        print(f"no case launched {name}")
    print(f"{len(checks)} cases, {len(launched)} kernels, {bad + len(never)} bad")
    return bad + len(never)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--only", default="", metavar="TEXT")
    parser.add_argument("--plant", choices=["write"])
    options = parser.parse_args()
    if backend.missing():
        print(f"Triton cannot run: {backend.missing()}")
        return 3
    device = "cpu" if backend.interpreted() else "cuda"
    if options.plant:
        plant(device)
        return 0
    every = [*layers(device), *prelaunch_kernels(device)]
    chosen = [check for check in every if options.only in check.name]
    if not chosen:
        print(f"no case is named like {options.only!r}")
        return 2
    if options.list:
        print(*(check.name for check in chosen), sep="\n")
        return 0
    return 1 if check_all(chosen, len(chosen) == len(every), device) else 0


if __name__ == "__main__":
    raise SystemExit(main())
