"""Launches of the second step, past Triton, beside those that Triton would make: exits 1 where an argument differs.

    python -m tests.support.repeated_launches 80

In a process of its own: Triton keeps the driver that compiles and launches nothing.
"""

from __future__ import annotations

import itertools
import sys
from typing import Any

import torch
import triton

from loradash_kernels.backends.triton import backend, launcher, prepared
from loradash_kernels.backends.triton.strategies import Strategy
from loradash_kernels.calls import Call
from loradash_kernels.testing import make_case

from .calls import calls, drawn_seed, outputs
from .pretended_driver import NothingLaunched, pretended_card


class Seen(list):
    """The arguments of launches, tensors by address: what a launcher makes of them."""

    def append(self, launch: tuple[Any, ...]) -> None:
        super().append(tuple(plain(argument) for argument in launch))


def plain(value: Any) -> Any:
    if hasattr(value, "block_shape"):
        return plain(value.base), tuple(value.shape), tuple(value.strides), tuple(value.block_shape)
    # Hooks without a function to call, and none.
    if getattr(value, "calls", None) == [] or type(value).__name__ == "LazyDict":
        return None
    return value.data_ptr() if hasattr(value, "data_ptr") else value


Launches = list[tuple[Any, ...]]


def launches(call: Call, strategy: Strategy) -> tuple[Launches, Launches]:
    """The launches of a call by Triton, and repeated."""
    given, _, addresses = prepared.look(call)
    plan = backend._prepare(given, strategy)
    found: list[Launches] = []
    for _ in range(2):
        NothingLaunched.seen = Seen()
        plan.run(given, addresses)
        found.append(NothingLaunched.seen)
    assert plan._repeats is not None, "the second launches went through Triton"
    return found[0], found[1]


def difference(call: Call, one: Launches, two: Launches) -> str | None:
    """Where launches differ; workspace, which lies nowhere that the call's own tensors do, may lie elsewhere."""
    fixed = {t.data_ptr() for t in call if isinstance(t, torch.Tensor)}

    def moved(a: Any, b: Any) -> bool:
        if isinstance(a, tuple):
            return moved(a[0], b[0]) and a[1:] == b[1:]
        both = isinstance(a, int) and isinstance(b, int) and min(a, b) > 1 << 32
        return both and a % 16 == b % 16 and not {a, b} & fixed

    if [len(launch) for launch in one] != [len(launch) for launch in two]:
        return f"{len(one)} launches and {len(two)}, or another number of arguments"
    for first, second in zip(one, two, strict=True):
        for place, (a, b) in enumerate(zip(first, second, strict=True)):
            if a != b and not moved(a, b):
                return f"{first[0]}: argument {place} is {a!r} by Triton, {b!r} repeated"
    return None


def main(architecture: int) -> int:
    kinds = ("fused", "library", "one_launch", *(["descriptors"] if architecture >= 90 else []))
    with pretended_card(architecture):
        print(f"Triton {triton.__version__}: {launcher._obstacle() or 'launches are repeated'}")
        for dropout_p, kind in itertools.product((0.1, 0.0), kinds):
            case = make_case(64, 64, 96, 8, 4, torch.bfloat16, adapter_dtype=torch.float32, dropout_p=dropout_p)
            for call in calls(case, outputs(case), drawn_seed(case)):
                one, two = launches(call, Strategy(kind))
                found = difference(call, one, two)
                print(kind, [launch[0] for launch in one], found or "same arguments")
                if found:
                    return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
