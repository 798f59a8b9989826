"""Layers that compute in a way of their own, quantised ones above all: the W that they stand for, whatever their format."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from .base_layers import PLAIN, computes_plainly, features, is_transposed
from .formats import Format, format_of

ROWS = 1024
"""A layer is asked for its products with this many rows of the identity at a time, and W is compared by so many of its rows."""

PROBES = 4
"""So many rows of the identity, and as many of random signs, tell whether a format's weight is that of its products."""


class RequantisationError(NamedTuple):
    """What became of W + ΔW when it was quantised anew: the Frobenius norm of the difference over that of W + ΔW, and over
    that of ΔW. From 1 on the latter says that the grid of the format has swallowed the update."""

    of_weight: float
    of_update: float


def is_quantised(weight: Any) -> bool:
    """Is a weight something else than plain floating numbers (bitsandbytes, torchao, ...)?"""
    if not isinstance(weight, Tensor):
        return False
    # The codes of four bits may be stored in a floating dtype.
    codes = getattr(weight, "quant_state", None) is not None
    return codes or weight.dtype not in PLAIN or type(weight).dequantize is not Tensor.dequantize


def compute_device(module: nn.Module) -> torch.device:
    """Where a layer's outputs are: its weight's device, or the one that accelerate brings an offloaded weight to."""
    hook = module.__dict__.get("_hf_hook")
    device = getattr(hook, "execution_device", None)
    return torch.device(device) if device is not None else cast(Tensor, module.weight).device


@torch.no_grad()
def weight_of(module: nn.Module) -> Tensor:
    """The W (N, K) that a linear layer multiplies with: a view of its weight, or a new tensor every time.

    Of a known format it is what the format says, where the layer's kernels agree; the layer is not called, and not written
    to. Any other layer is asked for its products with the identity, N K² multiplications.
    """
    weight = cast(Tensor, module.weight)
    if computes_plainly(module) and not weight.is_meta:
        return weight.t() if is_transposed(module) else weight
    kept = format_of(module)
    if kept is not None:
        found = _dequantised(module, kept)
        if found is not None:
            return found
    return _products(module)


def _dequantised(module: nn.Module, kept: Format) -> Tensor | None:
    """What the format says, where products of the layer's kernels with a few rows agree."""
    try:
        weight = kept.weight(module)
    # Releases of a framework may lack a function, or know formats that it does not take.
    except (AttributeError, ImportError, NotImplementedError, TypeError):
        return None
    k, n = features(module)
    return weight if weight.shape == (n, k) and _agrees(module, kept, weight) else None


def _agrees(module: nn.Module, kept: Format, weight: Tensor) -> bool:
    """Rows of the identity show single columns of W to within rounding, rows of signs a fault anywhere; layers that
    quantise their input take both as they are."""
    k = weight.shape[1]
    if not k:
        return True
    generator = torch.Generator().manual_seed(k)
    chosen = torch.randint(k, (PROBES,), generator=generator)
    signs = torch.randint(2, (PROBES, k), generator=generator) * 2.0 - 1
    x = torch.cat([torch.eye(1, k).roll(int(i), -1) for i in chosen] + [signs]).to(weight.device)
    with torch.autocast(weight.device.type, enabled=False):
        y = kept.product(module, x)
        if y is None:
            return True
        unit = max(torch.finfo(t).eps for t in (y.dtype, weight.dtype, torch.float32))
        if weight.device.type != "cpu":
            # Float32 may be multiplied as TF32.
            unit = max(unit, 2.0**-10)
        share = 4 * unit + k * torch.finfo(torch.float32).eps
        for products, rows in zip(y.split(ROWS, dim=1), weight.split(ROWS), strict=True):
            w = rows.float()
            if not bool(((products - x @ w.t()).abs() <= share * (x.abs() @ w.abs().t())).all()):
                return False
    return True


def _products(module: nn.Module) -> Tensor:
    """The layer's products with the identity, less that with zero: whatever its format is, the W (N, K) of its own outputs.

    Its hooks do not see these calls, unless the layer is called in a way of its own.
    """
    k, _ = features(module)
    weight, device = cast(Tensor, module.weight), compute_device(module)
    # Layers with codes for a weight take float32.
    codes = weight.dtype not in PLAIN or getattr(weight, "quant_state", None) is not None
    dtype = torch.float32 if codes else weight.dtype
    call = module.forward if type(module).__call__ is nn.Module.__call__ else module
    with torch.autocast(device.type, enabled=False):
        offset = call(torch.zeros(1, k, dtype=dtype, device=device))
        columns = [
            call(torch.eye(min(ROWS, k - k0), k, dtype=dtype, device=device).roll(k0, -1)) - offset
            for k0 in range(0, k, ROWS)
        ]
    return torch.cat(columns).t()


def check_differentiable(name: str, module: nn.Module, x: Tensor, y: Tensor) -> None:
    """Raises RuntimeError where a layer's output y for x has no gradient that should have one."""
    if x.requires_grad and not y.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(
            f"{name}: {type(module).__name__} gives no gradient for its input, and what is below it would train on a wrong one; "
            "evaluate it under torch.no_grad; to train, take another format or leave the layer out (exclude_modules)"
        )


def can_take_update(module: nn.Module) -> bool:
    """Is adding to a layer's weight adding to its products? A layer with a forward of its own is asked for these."""
    if computes_plainly(module):
        return True
    weight = module._parameters.get("weight")
    if type(weight) is not nn.Parameter or weight.dtype not in PLAIN or weight.dim() != 2:
        return False
    own = weight.t() if is_transposed(module) else weight
    rounding = 2 * torch.finfo(weight.dtype).eps
    return torch.allclose(weight_of(module).double(), own.double(), rtol=rounding, atol=rounding)


def requantise_refusal(module: nn.Module) -> str | None:
    """Why W + ΔW of a quantised layer cannot be quantised anew, or None."""
    kept = format_of(module)
    if kept is None:
        return f"{type(module).__name__} is of no format that can be quantised anew"
    return kept.refusal(module)


@torch.no_grad()
def requantise(module: nn.Module, delta: Tensor) -> tuple[dict[str, Any], RequantisationError]:
    """Quantises W + ΔW anew, in the layer's own format, in its place.

    Returns the attributes that were replaced, for `restore`, and the error. Raises ValueError, with the layer unchanged,
    where the format offers no way, where W + ΔW is not finite and where it leaves the range of the format.
    """
    refusal = requantise_refusal(module)
    if refusal is not None:
        raise ValueError(refusal)
    if not bool(delta.any()):
        return {}, RequantisationError(0.0, 0.0)
    kept = cast(Format, format_of(module))
    wanted = weight_of(module).float() + delta
    if not bool(wanted.isfinite().all()):
        raise ValueError(f"W + ΔW of {type(module).__name__} is not finite")
    parts = kept.requantised(module, wanted)
    before = {name: getattr(module, name) for name in parts}
    restore(module, parts)
    try:
        error = weight_of(module).float() - wanted
        if not bool(error.isfinite().all()):
            raise ValueError(
                f"W + ΔW reaches {wanted.abs().max():.3g}, which the format of {type(module).__name__} cannot hold"
            )
    except BaseException:
        restore(module, before)
        raise
    size = error.norm()
    return before, RequantisationError(_ratio(size, wanted.norm()), _ratio(size, delta.norm()))


def _ratio(error: Tensor, size: Tensor) -> float:
    return float(error / size) if bool(error) else 0.0


def restore(module: nn.Module, parts: dict[str, Any]) -> None:
    """Puts attributes that `requantise` replaced back."""
    for name, value in parts.items():
        setattr(module, name, value)
