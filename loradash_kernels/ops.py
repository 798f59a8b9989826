"""Operators of the `loradash` namespace: schemas, allocation and the choice of a backend.

One schema per operator, here and nowhere else. `allocate_*` serves the real and the fake implementation alike, so their
shapes, dtypes and strides agree by construction. A backend fills what it is given.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .backends import cuda as cuda_backend
from .backends import extension, reference
from .backends.triton import backend as triton_backend
from .calls import accumulator
from .notices import warn_once

LIBRARY = torch.library.Library("loradash", "DEF")

_ADAPTERS = "Tensor lora_a, Tensor lora_b, Tensor? dash_u, Tensor? dash_vt, Tensor? dash_sigma"
_OPTIONS = "Tensor? seed, float scaling, int threshold"

LIBRARY.define(
    f"dash_linear(Tensor x, Tensor weight, Tensor? bias, {_ADAPTERS}, {_OPTIONS}, str? backend) -> (Tensor y, Tensor p)"
)
LIBRARY.define(f"low_rank_update(Tensor y, Tensor x, {_ADAPTERS}, {_OPTIONS}, str? backend) -> (Tensor out, Tensor p)")
LIBRARY.define(
    f"dash_linear_backward(Tensor dy, Tensor x, Tensor? weight, {_ADAPTERS}, Tensor p, {_OPTIONS}, bool[] needs, "
    "str? backend) -> (Tensor dx, Tensor da, Tensor db_lora, Tensor dsigma, Tensor dbias)"
)

# --- backends --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Backend:
    """A set of kernels: why it cannot run at all, why it cannot take this x and R = r + s, and its two entry points."""

    name: str
    missing: Callable[[], str | None]
    refuses: Callable[[Tensor, int], str | None]
    forward: Callable[..., None]
    backward: Callable[..., None]
    # Why another one, which takes this x and R, is the better one where none was asked for.
    yields: Callable[[Tensor, int], str | None] = lambda x, width: None


_CPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_CPU = torch.device("cpu")


def _cpu_refuses(x: Tensor, width: int) -> str | None:
    if x.device != _CPU:
        return f"x is on {x.device}"
    if x.dtype not in _CPU_DTYPES:
        return f"x is {x.dtype}, the compiled kernels take float32, bfloat16 and float16"
    return None


def _cpu_forward(*args: object) -> None:
    torch.ops.loradash_cpu.forward(*args)


def _cpu_backward(*args: object) -> None:
    torch.ops.loradash_cpu.backward(*args)


def _below_autocast(run: Callable[..., None]) -> Callable[..., None]:
    """For a backend of PyTorch's own products: autocast, which has cast what it may, casts none of their operands."""

    def uncast(*args: object) -> None:
        with torch._C._DisableAutocast():
            run(*args)

    return uncast


_REFERENCE = Backend(
    "reference",
    lambda: None,
    lambda x, width: None,
    _below_autocast(reference.forward),
    _below_autocast(reference.backward),
)
BACKENDS = (
    Backend(
        "cpu",
        lambda: extension.missing_reason,
        _cpu_refuses,
        torch.ops.loradash_cpu.forward.default if extension.is_compiled() else _cpu_forward,
        torch.ops.loradash_cpu.backward.default if extension.is_compiled() else _cpu_backward,
    ),
    Backend(
        "cuda",
        cuda_backend.missing,
        cuda_backend.refuses,
        cuda_backend.forward,
        cuda_backend.backward,
        cuda_backend.yields,
    ),
    Backend("triton", triton_backend.missing, triton_backend.refuses, triton_backend.forward, triton_backend.backward),
    _REFERENCE,
)
"""In order of preference."""


@dataclass(frozen=True)
class BackendChoice:
    """Which backend a call takes, and for every other one why not."""

    backend: str
    reasons: dict[str, str]

    def __str__(self) -> str:
        return "\n".join([f"{self.backend}: runs", *(f"{name}: {reason}" for name, reason in self.reasons.items())])


def _reason_against(backend: Backend, x: Tensor, width: int) -> str | None:
    return backend.missing() or backend.refuses(x, width)


def _choose(x: Tensor, width: int, requested: str | None) -> Backend:
    if requested is None:
        for backend in BACKENDS:
            if not (backend.missing() or backend.refuses(x, width) or backend.yields(x, width)):
                return backend
    for backend in BACKENDS:
        if backend.name == requested:
            reason = _reason_against(backend, x, width)
            if reason is not None:
                raise RuntimeError(f"backend={requested!r} cannot run: {reason}")
            return backend
    raise ValueError(f"backend must be one of {[b.name for b in BACKENDS]}, got {requested!r}")


def pick_backend(x: Tensor, width: int = 0, requested: str | None = None) -> Backend:
    """The backend for x and R = `width`: the requested one, or the first that takes it and yields to none.

    Warns, once for each reason, where plain PyTorch must do what kernels are there for: x of 16 or 32 bits on a CPU or a
    GPU. Raises ValueError for an unknown name and RuntimeError when the requested backend cannot run.
    """
    chosen = _choose(x, width, requested)
    if chosen is _REFERENCE and requested is None and x.dtype in _CPU_DTYPES:
        _warn_of_reference(x, width)
    return chosen


_KERNELS = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}  # the backends that are there for a type of device


def _warn_of_reference(x: Tensor, width: int) -> None:
    device = x.device.type
    names = _KERNELS.get(device, ())
    reasons = [f"{b.name}: {_reason_against(b, x, width)}" for b in BACKENDS if b.name in names]
    if reasons:
        warn_once(f"plain PyTorch computes LoRA-Dash layers on this {device} device, slowly. " + "; ".join(reasons))


def explain_backend(x: Tensor, backend: str | None = None, *, width: int = 0) -> BackendChoice:
    """Which backend a call with this x and R = r + s = `width` takes, and why not the others.

    Of x device and dtype matter, not the shape.
    """
    chosen = _choose(x, width, backend)
    reasons = {
        b.name: _reason_against(b, x, width)
        or (None if backend else b.yields(x, width))
        or (f"{chosen.name} was asked for" if backend else f"{chosen.name} comes first")
        for b in BACKENDS
        if b is not chosen
    }
    return BackendChoice(chosen.name, reasons)


def available_backends() -> dict[str, str | None]:
    """Every backend by name, with None where it can run here, else the reason why it cannot."""
    return {b.name: b.missing() for b in BACKENDS}


# --- allocation, shared by real and fake -----------------------------------------------------------------------------


def allocate_forward(x: Tensor, out_features: int, width: int) -> tuple[Tensor, Tensor]:
    """y (M, N) in the dtype of x, P (M, R) in the accumulator's."""
    m = x.shape[0]
    return x.new_empty((m, out_features)), x.new_empty((m, width), dtype=accumulator(x.dtype))


def allocate_backward(
    x: Tensor, lora_a: Tensor, lora_b: Tensor, directions: int, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dx, da, db_lora, dsigma, dbias; those not needed are empty (0,), in the dtype of x."""
    wide = accumulator(x.dtype)

    def gradient(i: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return x.new_empty(shape, dtype=dtype) if needs[i] else x.new_empty(0)

    return (
        gradient(0, x.shape, x.dtype),
        gradient(1, lora_a.shape, wide),
        gradient(2, lora_b.shape, wide),
        gradient(3, (directions,), wide),
        gradient(4, (lora_b.shape[0],), wide),
    )


def directions_of(dash_sigma: Tensor | None) -> int:
    return 0 if dash_sigma is None else dash_sigma.shape[0]


# --- implementations -------------------------------------------------------------------------------------------------


def dash_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    dash_u: Tensor | None,
    dash_vt: Tensor | None,
    dash_sigma: Tensor | None,
    seed: Tensor | None,
    scaling: float,
    threshold: int,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    width = lora_a.shape[0] + directions_of(dash_sigma)
    y, p = allocate_forward(x, weight.shape[0], width)
    run = pick_backend(x, width, backend).forward
    run(x, weight, bias, lora_a, lora_b, dash_u, dash_vt, dash_sigma, seed, scaling, threshold, None, y, p)
    return y, p


def low_rank_update(
    y: Tensor,
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    dash_u: Tensor | None,
    dash_vt: Tensor | None,
    dash_sigma: Tensor | None,
    seed: Tensor | None,
    scaling: float,
    threshold: int,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    width = lora_a.shape[0] + directions_of(dash_sigma)
    out, p = allocate_forward(x, lora_b.shape[0], width)
    run = pick_backend(x, width, backend).forward
    run(x, None, None, lora_a, lora_b, dash_u, dash_vt, dash_sigma, seed, scaling, threshold, y, out, p)
    return out, p


def dash_linear_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    dash_u: Tensor | None,
    dash_vt: Tensor | None,
    dash_sigma: Tensor | None,
    p: Tensor,
    seed: Tensor | None,
    scaling: float,
    threshold: int,
    needs: list[bool],
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    grads = allocate_backward(x, lora_a, lora_b, directions_of(dash_sigma), needs)
    out = [g if n else None for g, n in zip(grads, needs, strict=True)]
    run = pick_backend(x, p.shape[1], backend).backward
    run(dy, x, weight, lora_a, lora_b, dash_u, dash_vt, dash_sigma, p, seed, scaling, threshold, *out)
    return grads


def _fake_dash_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, dash_u: Tensor | None,
    dash_vt: Tensor | None, dash_sigma: Tensor | None, *options: object,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return allocate_forward(x, weight.shape[0], lora_a.shape[0] + directions_of(dash_sigma))


def _fake_low_rank_update(
    y: Tensor, x: Tensor, lora_a: Tensor, lora_b: Tensor, dash_u: Tensor | None, dash_vt: Tensor | None,
    dash_sigma: Tensor | None, *options: object,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return allocate_forward(x, lora_b.shape[0], lora_a.shape[0] + directions_of(dash_sigma))


def _fake_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, lora_a: Tensor, lora_b: Tensor, dash_u: Tensor | None,
    dash_vt: Tensor | None, dash_sigma: Tensor | None, p: Tensor, seed: Tensor | None, scaling: float, threshold: int,
    needs: list[bool], backend: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return allocate_backward(x, lora_a, lora_b, directions_of(dash_sigma), needs)


for _name, _real, _fake in (
    ("dash_linear", dash_linear, _fake_dash_linear),
    ("low_rank_update", low_rank_update, _fake_low_rank_update),
    ("dash_linear_backward", dash_linear_backward, _fake_backward),
):
    LIBRARY.impl(_name, _real, "CompositeExplicitAutograd")
    torch.library.register_fake(f"loradash::{_name}", _fake, lib=LIBRARY)

# The compiled operators have no gradients of their own. Past autograd's key the dispatcher meets the keys of negated and of
# zero tensors, which it makes ordinary ones before it calls the kernel.
COMPILED = [torch.library.Library(f"loradash_{device}", "IMPL") for device in ("cpu", "cuda")]
if extension.is_compiled():
    for _library, _key in zip(COMPILED, ("AutogradCPU", "AutogradCUDA"), strict=True):
        for _name in ("forward", "backward"):
            _library.impl(_name, torch.library.fallthrough_kernel, _key)
