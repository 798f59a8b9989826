"""Which backend runs a call: the only place that chooses.

An explicit `backend=` is obeyed or raises. Without one the first of `BACKENDS` that takes the call has it, unless a
measurement of this GPU (see `tuning`) says that another is faster.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from ..calls import KERNEL_DTYPES, BackwardCall, Call, ForwardCall
from ..notices import warn_once
from . import cpu, cuda, reference, tuning
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

# Each type of device has backends that are made for it.
_KERNELS: dict[str, tuple[Backend, ...]] = {"cpu": (cpu,), "cuda": (cuda, triton)}


@dataclass(frozen=True)
class BackendChoice:
    """Which backend a call takes, and for every other one why not."""

    backend: str
    reasons: dict[str, str]

    def __str__(self) -> str:
        return "\n".join([f"{self.backend}: runs", *(f"{name}: {reason}" for name, reason in self.reasons.items())])


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


def _first(x: Tensor, width: int) -> Backend:
    for backend in BACKENDS:
        if not (backend.missing() or backend.refuses(x, width) or (backend is cuda and _better_by_triton(x, width))):
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


def _better_by_triton(x: Tensor, width: int) -> str | None:
    """Why the Triton backend is better than the CUDA backend for this x and R = `width`, or None.

    Without matrix instructions that run beside the program, both use mma.sync.
    """
    target = None if triton.missing() else triton.target_of(x.device)
    if target is None or not target.asynchronous or triton.refuses(x, width):
        return None
    own = "wgmma" if target.matrix_instruction == "HGMMA" else "tcgen05"
    card = triton.architecture_of(x.device)
    return f"on {card} Triton uses {own}, these kernels mma.sync; ask for backend='cuda' to have them"


def _warn_of_reference(x: Tensor, width: int) -> None:
    device = x.device.type
    reasons = [f"{b.name}: {_reason_against(b, x, width)}" for b in _KERNELS.get(device, ())]
    if reasons:
        warn_once(f"plain PyTorch computes LoRA-Dash layers on this {device} device, slowly. " + "; ".join(reasons))


def explain_backend(x: Tensor, backend: str | None = None, *, width: int = 0) -> BackendChoice:
    """Which backend a call with this x and R = r + s = `width` takes, and why not the others.

    Device and dtype of x matter, not the shape: what LORADASH_TUNE=1 measured for single shapes is left out.
    """
    chosen = _first(x, width) if backend is None else _named(backend, x, width)

    def reason(other: Backend) -> str:
        against = _reason_against(other, x, width)
        if against is not None:
            return against
        if backend is not None:
            return f"{chosen.name} was asked for"
        return (other is cuda and _better_by_triton(x, width)) or f"{chosen.name} comes first"

    return BackendChoice(chosen.name, {b.name: reason(b) for b in BACKENDS if b is not chosen})


def available_backends() -> dict[str, str | None]:
    """Every backend by name, with None where it can run here, else the reason why it cannot."""
    return {b.name: b.missing() for b in BACKENDS}
