"""Faults planted in a backend, which the tests of the matrix must find."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from loradash_kernels.backends import registry
from loradash_kernels.calls import BackwardCall, Call, ForwardCall

Pass = Callable[[Call], None]


def too_large(real: Pass) -> Pass:
    """Every number is too large by a thousandth, or by eight units of the dtype's rounding where that is more."""

    def mutant(call: Call) -> None:
        real(call)
        for t in results(call):
            t.mul_(1 + max(1e-3, 8 * torch.finfo(call.x.dtype).eps))

    return mutant


def of_another_mask(real: Pass) -> Pass:
    """The mask of the next counter."""

    def mutant(call: Call) -> None:
        real(call if call.seed is None else call._replace(seed=call.seed + torch.tensor([0, 1]).to(call.seed)))

    return mutant


def of_another_row(real: Pass) -> Pass:
    """The mask of the row above: rows of x and dy are moved down by one, those of the results up."""

    def mutant(call: Call) -> None:
        rows = ("x", "dy", "base", "y", "p", "dx")
        moved = {n: t.roll(1, 0) for n in rows if (t := getattr(call, n, None)) is not None}
        real(call._replace(**moved))
        for name in ("y", "p") if isinstance(call, ForwardCall) else ("dx",):
            if name in moved:
                getattr(call, name).copy_(moved[name].roll(-1, 0))

    return mutant


def unwritten(real: Pass) -> Pass:
    """The last element of every result is what was in memory."""

    def mutant(call: Call) -> None:
        before = [t.flatten()[-1:].clone() for t in results(call)]
        real(call)
        for t, last in zip(results(call), before, strict=True):
            t.view(-1)[-1:] = last

    return mutant


def without_the_last_row(real: Pass) -> Pass:
    """Sums over M end one row early."""

    def mutant(call: Call) -> None:
        if isinstance(call, BackwardCall):
            dy = call.dy.clone()
            dy[-1] = 0
            call = call._replace(dy=dy)
        real(call)

    return mutant


def results(call: Call) -> list[torch.Tensor]:
    names = ("y", "p") if isinstance(call, ForwardCall) else ("dx", "da", "db_lora", "dsigma", "dbias")
    return [t for name in names if (t := getattr(call, name)) is not None and t.numel()]


FAULTS = {f.__name__: f for f in (too_large, of_another_mask, of_another_row, unwritten, without_the_last_row)}


def plant(monkeypatch: Any, backend: str, pass_: str, fault: str) -> None:
    """Whatever `backend` computes in this pass has the fault until monkeypatch undoes it."""
    (module,) = (b for b in registry.BACKENDS if b.name == backend)
    monkeypatch.setattr(module, pass_, FAULTS[fault](getattr(module, pass_)))
