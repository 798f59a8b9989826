"""The operator's matrix: every backend of a device, every way it may compute, each from memory that holds NaN."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from loradash_kernels.backends import cuda, tuning
from loradash_kernels.backends.triton import backend as triton_backend
from loradash_kernels.testing import Case, check_error_rule, make_case, run

from .calls import calls, outputs
from .devices import TAKES, backends_on, refusal


@dataclass(frozen=True)
class Way:
    """A backend, a dtype of x, and what is forced on a pass: a tile or a strategy, by its str(); None: the default."""

    backend: str
    dtype: torch.dtype
    name: str = "default"

    def __str__(self) -> str:
        tile = re.search(
            r"kind='(\w+)'(?:.*m=(\d+), block_n=(\d+), block_k=(\d+), num_warps=(\d+), num_stages=(\d+))?", self.name
        )
        parts = [part for part in (tile.groups() if tile else (self.name,)) if part]
        return "-".join([self.backend, str(self.dtype).removeprefix("torch."), "x".join(parts)])

    @property
    def is_fused(self) -> bool:
        """Do its own kernels take every sum, so that reruns give the same bits?"""
        return self.backend != "reference" and self.name != "default" and cuda.LIBRARY not in self.name

    def forced(self, case: Case) -> dict[str, Any] | None:
        """The candidate by pass, for `tuning.forced`; {} for the default; None where this way takes no pass of this case."""
        if self.name == "default":
            return {}
        found = {p: c for p, names in candidates(self.backend, case).items() for c in names if str(c) == self.name}
        return found or None


def candidates(backend: str, case: Case) -> dict[str, list[Any]]:
    """Whatever a backend may be told to do for the forward and the backward pass of a case."""
    both = calls(case, outputs(case))
    if backend == "cuda":
        return {call.pass_: [*cuda.candidates(call), cuda.FUSED] for call in both}
    if backend == "triton":
        from loradash_kernels.backends.triton import strategies
        from loradash_kernels.backends.triton.problem import Problem

        target = triton_backend.target_of(case.device)
        assert target is not None, "a backend that refuses nothing has a target"
        return {call.pass_: strategies.candidates(Problem(call, target)) for call in both}
    return {}


def ways_on(device: torch.device) -> list[Any]:
    """Parameters of tests: every way of every backend that can run on a device, by dtype; float64 is no kernel's. The rehearsal
    leaves float16 out, which has the tiles of bfloat16."""
    dtypes = [torch.float32, torch.bfloat16] + [torch.float16] * (device.type == "cuda")
    found: list[Any] = []
    for backend in backends_on(device):
        if not isinstance(backend, str):
            # It is skipped, with its reason.
            found.append(pytest.param(None, id=backend.values[0], marks=backend.marks))
            continue
        for dtype in (d for d in dtypes if d in TAKES[backend]):
            # Sides that every tile takes.
            probe = make_case(8, 256, 256, 16, 8, dtype, device=device)
            both = candidates(backend, probe).values()
            names = ["default", *dict.fromkeys(str(c) for found_by_pass in both for c in found_by_pass)]
            found += [pytest.param(way, id=str(way)) for way in (Way(backend, dtype, name) for name in names)]
    return found


@contextlib.contextmanager
def poisoned(device: torch.device) -> Iterator[None]:
    """Memory that nobody has written is NaN: whatever PyTorch allocates, which it fills in this mode, and on a GPU what its
    allocator gives out to others."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(3, device=device).isnan().all()
        if device.type == "cuda":
            # Small tensors have segments of their own, of 2 MB. These bytes are NaN in every floating dtype.
            held = [torch.full((size,), 255, dtype=torch.uint8, device=device) for size in [2**20] * 16 + [2**28]]
            del held
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def close(found: Any, wanted: Any) -> None:
    """torch.testing.assert_close; in 16 bits to a few units of rounding of numbers of order one."""
    first = found[0] if isinstance(found, (list, tuple)) else found
    unit = torch.finfo(first.dtype).eps
    torch.testing.assert_close(found, wanted, **({"rtol": 8 * unit, "atol": 8 * unit} if unit > 1e-5 else {}))


def refused(case: Case, backend: str) -> bool:
    """Must this backend refuse such a case, which it is then seen to do, in the right words?"""
    words = refusal(backend, case.x.dtype, width(case))
    if words is None:
        return False
    with pytest.raises(RuntimeError, match=words):
        run(case, backend)
    return True


def checked(
    case: Case, backend: str, base: bool = True, mask: torch.Tensor | None = None, **forced: Any
) -> dict[str, torch.Tensor] | None:
    """Output and gradients, by the error rule, from memory of NaN; None where this backend refuses such a case, as it should.

    forced: the candidate by pass.
    """
    if refused(case, backend):
        return None
    with poisoned(case.device), tuning.forced(backend, **forced):
        found = run(case, backend, base)
    check_error_rule(case, found, mask)
    return found


def width(case: Case) -> int:
    """R = r + s."""
    sigma, a = case.tensors["dash_sigma"], case.tensors["lora_a"]
    assert a is not None
    return a.shape[0] + (0 if sigma is None else sigma.shape[0])


def need_memory(device: torch.device, gigabytes: float) -> None:
    """Skips a test, with the reason, on a card that has less free."""
    if device.type != "cuda":
        return
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    if free < gigabytes * 1e9:
        pytest.skip(f"needs {gigabytes:.0f} GB of GPU memory, {free / 1e9:.0f} of {total / 1e9:.0f} GB are free")


def judging_gigabytes(m: int, k: int, n: int) -> float:
    """What running a case and judging it in float64 takes, about: twenty copies of x and y, five of W."""
    return 160e-9 * (m * k + m * n) + 40e-9 * n * k
