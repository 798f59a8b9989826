"""Which backend runs a call: the only place that chooses.

An explicit `backend=` is obeyed or raises. Without one the first of `BACKENDS` that takes the call has it, unless a
measurement of this GPU (see `tuning`) says that another is faster. Choosing compiles nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ..calls import (
    KERNEL_DTYPES,
    BackwardCall,
    Call,
    ForwardCall,
    GroupCall,
    GroupForwardCall,
    widths,
)
from ..notices import warn_once
from . import cards, cpu, cuda, reference, tuning
from .triton import backend as triton


class Backend(Protocol):
    """A set of kernels: a module of this shape, and a place in `BACKENDS`."""

    name: str

    def missing(self) -> str | None:
        """Why it cannot run here at all, or None."""

    def refuses(self, x: Tensor, width: int = 0, /) -> str | None:
        """Why it cannot take a call with this x and R = r + s = `width`, or None."""

    def forward(self, call: ForwardCall, /) -> None:
        """Fills y and p."""

    def backward(self, call: BackwardCall, /) -> None:
        """Fills the gradients that are not None."""


BACKENDS: tuple[Backend, ...] = (cpu, cuda, triton, reference)
"""In order of preference."""

# Their `group_forward` and `group_backward` take a group in one pass over x.
_GROUPED = frozenset({"cpu", "reference"})

# Each type of device has backends that are made for it.
_KERNELS: dict[str, tuple[Backend, ...]] = {"cpu": (cpu,), "cuda": (cuda, triton)}


@dataclass(frozen=True)
class BackendChoice:
    """Which backend a call takes and how it runs there, and for every other one why not.

    remedy: what would let kernels run it, where plain PyTorch does and kernels are made for such a call on a GPU.
    """

    backend: str
    reasons: dict[str, str]
    how: str = ""
    remedy: str = ""

    def __str__(self) -> str:
        runs = f"{self.backend}: runs; {self.how}" if self.how else f"{self.backend}: runs"
        return "\n".join([runs, *(f"{name}: {reason}" for name, reason in self.reasons.items())])


def pick(call: Call, requested: str | None = None) -> Backend:
    """The backend that runs this call: the requested one, else the measured one, else the first that takes it.

    Warns, once for each reason, where plain PyTorch must do what kernels are there for: x of 16 or 32 bits on a CPU or a
    GPU. Raises ValueError for an unknown name and RuntimeError when the requested backend cannot run.
    """
    x, width = call.x, call.p.shape[1]
    if requested is not None:
        return _named(requested, x, width)
    chosen = _first(x, width)
    if chosen is reference:
        if x.dtype in KERNEL_DTYPES:
            _warn_of_reference(x, width)
    elif chosen is not cpu and x.is_cuda:
        return _measured(call) or chosen
    return chosen


def run_group(call: GroupCall, requested: str | None = None) -> None:
    """Fills the results of a group's call: in one pass over x where the backend has kernels for a group (`_GROUPED`), else
    member after member with the same mask, each on the backend that `pick` gives it.

    Raises and warns as `pick`, for the widest member.
    """
    width = max(widths(call))
    chosen = _first(call.x, width) if requested is None else _named(requested, call.x, width)
    if chosen.name not in _GROUPED:
        _member_by_member(call, requested)
        return
    if requested is None and chosen is reference and call.x.dtype in KERNEL_DTYPES:
        _warn_of_reference(call.x, width)
    kernels: Any = chosen
    (kernels.group_forward if isinstance(call, GroupForwardCall) else kernels.group_backward)(call)


def _member_by_member(call: GroupCall, requested: str | None) -> None:
    if isinstance(call, GroupForwardCall):
        for i, columns in enumerate(call.p.split(widths(call), 1)):
            member = call.member(i, call.p.new_empty(columns.shape))
            pick(member, requested).forward(member)
            columns.copy_(member.p)
        return
    for i, columns in enumerate(call.p.split(widths(call), 1)):
        dx = None if call.dx is None else call.dx if i == 0 else call.dx.new_empty(call.dx.shape)
        part = call.member(i, columns.contiguous(), dx)
        pick(part, requested).backward(part)
        if call.dx is not None and dx is not None and i:
            call.dx.add_(dx)


def _first(x: Tensor, width: int) -> Backend:
    for backend in BACKENDS:
        if not _reason_against(backend, x, width):
            return backend
    raise AssertionError("the reference refuses nothing")


def _named(name: str, x: Tensor, width: int) -> Backend:
    backend = _by_name(name)
    reason = _reason_against(backend, x, width)
    if reason is not None:
        raise RuntimeError(f"backend={name!r} cannot run: {reason}")
    return backend


def _by_name(name: str) -> Backend:
    for backend in BACKENDS:
        if backend.name == name:
            return backend
    raise ValueError(f"backend must be one of {[b.name for b in BACKENDS]}, got {name!r}")


def _measured(call: Call) -> Backend | None:
    """The fastest of the kernels that take this call, where that was measured or is to be measured now."""

    def candidates() -> list[str]:
        x, width = call.x, call.p.shape[1]
        return [b.name for b in BACKENDS if b is not reference and _reason_against(b, x, width) is None]

    found = tuning.choose("backend", call, candidates, lambda name: getattr(_by_name(name), call.pass_)(call))
    return None if found is None else _by_name(found)


def _reason_against(backend: Backend, x: Tensor, width: int) -> str | None:
    return backend.missing() or backend.refuses(x, width)


def _warn_of_reference(x: Tensor, width: int) -> None:
    device = x.device.type
    reasons = [f"{b.name}: {_reason_against(b, x, width)}" for b in _KERNELS.get(device, ())]
    if reasons:
        sentences = ["; ".join(reasons), _remedy(x, width) if x.is_cuda else ""]
        said = ". ".join(filter(None, sentences))
        warn_once(f"plain PyTorch computes LoRA-Dash layers on this {device} device, slowly. {said}")


def _remedy(x: Tensor, width: int) -> str:
    """What would let kernels run such a call on a GPU, or "" where nothing would."""
    if width > triton.MAX_WIDTH:
        return f"No kernel takes r + s above {triton.MAX_WIDTH}: choose a smaller rank"
    architecture, target = cards.architecture_of(x.device), triton.target_of(x.device)
    if architecture.startswith("sm_") and cards.capability_of(x.device) < cuda.OLDEST:
        return f"No kernel runs on {architecture}: sm_{cuda.OLDEST[0]}{cuda.OLDEST[1]} or newer is needed"
    remedies = []
    if target is not None:
        # There are tiles for it: Triton is not there, or too old.
        oldest = ".".join(map(str, target.triton))
        remedies.append(f"install Triton {oldest} or newer (`pip install 'triton>={oldest}'`)")
    if not torch.version.hip and x.dtype in cuda.DTYPES:
        remedies.append(f"build the compiled part with a CUDA toolkit for {architecture} (docs/install.md)")
    text = ", or ".join(remedies)
    return text[:1].upper() + text[1:]


def explain_backend(x: Tensor, backend: str | None = None, *, width: int = 0, members: int = 1) -> BackendChoice:
    """Which backend a call with this x and R = r + s = `width` takes, how, and why not the others.

    members: of a `dash_linear_group`, whose widest has this width; 1 for a `dash_linear`.

    Device and dtype of x matter, not the shape: what was measured for single shapes is counted, not consulted.
    """
    chosen = _first(x, width) if backend is None else _named(backend, x, width)
    taken = f"{chosen.name} comes first" if backend is None else f"{chosen.name} was asked for"
    reasons = {b.name: _reason_against(b, x, width) or taken for b in BACKENDS if b is not chosen}
    unserved = chosen is reference and x.is_cuda and x.dtype in KERNEL_DTYPES
    how = "; ".join(filter(None, (_how(chosen, x), _how_grouped(chosen) if members > 1 else "")))
    return BackendChoice(chosen.name, reasons, how, _remedy(x, width) if unserved else "")


def _how_grouped(chosen: Backend) -> str:
    if chosen.name in _GROUPED:
        return "the members of a group in one pass over x"
    return "the members of a group one after another, with the same mask, and dx summed"


def _how(chosen: Backend, x: Tensor) -> str:
    """What the kernels of a GPU do with the base product, and why."""
    if not x.is_cuda or chosen not in _KERNELS["cuda"]:
        return ""
    known = tuning.known_of(chosen.name, x.device)
    product = "the vendor's base product with its low-rank kernels"
    if known is None:
        return f"{product}: no measurement of this card ({cards.name_of(x.device)}) says that a fused tile is faster"
    return f"a fused tile where one was measured to be faster, else {product} ({known})"


def available_backends() -> dict[str, str | None]:
    """Every backend by name, with None where it can run here, else the reason why it cannot."""
    return {b.name: b.missing() for b in BACKENDS}
