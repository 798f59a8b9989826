"""The formula in differentiable PyTorch operations, for transforms that look inside a function.

torch.func (grad, vmap, jvp, hessian, ...) and forward-mode automatic differentiation differentiate and batch what they
see. The fused operator shows them nothing, so its calls take this formula there: every transform, any order of derivatives,
at the price of separate products. So do exported programs that are to run without this package. Letters as in `reference`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.autograd import forward_ad
from torch.nn import functional as F

from .backends.reference import stacked
from .calls import accumulator
from .random import dropout_mask, keep_scale


def is_wanted() -> bool:
    """Is a transform of torch.func active, or a level of forward-mode differentiation?"""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def refuse(threshold: int, backend: str | None) -> None:
    """Raises RuntimeError for what the formula cannot do: dropout (threshold > 0), and obey a requested backend."""
    where = "under torch.func transforms and forward-mode differentiation"
    if threshold:
        raise RuntimeError(f"loradash: dropout is not supported {where}; call model.eval() or pass training=False")
    if backend is not None:
        raise RuntimeError(f"loradash: backend={backend!r} is not supported {where}; pass backend=None")


def _without_autocast(device: str) -> contextlib.AbstractContextManager:
    """Sums keep their precision: what autocast may cast has been cast."""
    if torch._C._is_any_autocast_enabled() and torch.amp.is_autocast_available(device):
        return torch.autocast(device, enabled=False)
    return contextlib.nullcontext()


def dash_linear(
    x: Tensor,  # (..., K)
    weight: Tensor,  # (N, K)
    bias: Tensor | None,  # (N,)
    lora_a: Tensor,
    lora_b: Tensor,
    dash_u: Tensor | None,
    dash_vt: Tensor | None,
    dash_sigma: Tensor | None,
    scaling: float,
) -> Tensor:  # (..., N)
    """x W^T + b + ((x D^T) * c) Q^T."""
    with _without_autocast(x.device.type):
        base = F.linear(x, weight, bias)
    return low_rank_update(base, x, lora_a, lora_b, dash_u, dash_vt, dash_sigma, scaling)


def low_rank_update(
    y: Tensor,  # (..., N)
    x: Tensor,  # (..., K)
    lora_a: Tensor,
    lora_b: Tensor,
    dash_u: Tensor | None,
    dash_vt: Tensor | None,
    dash_sigma: Tensor | None,
    scaling: float,
) -> Tensor:  # (..., N)
    """y + ((x D^T) * c) Q^T, in the dtype of y; the low-rank sums in float32 (float64 for float64), as in the kernels."""
    return _updated(y, x, lora_a, lora_b, dash_u, dash_vt, dash_sigma, None, scaling, 0)[0]


def _updated(y: Tensor, x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    """The sum, and P = x D^T. The arguments are those of the operator before `backend`."""
    lora_a, lora_b, dash_u, dash_vt, dash_sigma, seed, scaling, threshold = arguments
    dtype = accumulator(x.dtype)
    with _without_autocast(x.device.type):
        d, q, c = stacked(lora_a, lora_b, dash_u, dash_vt, dash_sigma, scaling, dtype)
        wide = x.to(dtype)
        if seed is not None and threshold:
            wide = wide * dropout_mask(seed, threshold, *x.shape) * keep_scale(threshold)
        p = wide @ d.t()
        return (y.to(dtype) + (p * c) @ q.t()).to(y.dtype), p


def operator_decompositions() -> dict[OpOverload, Callable[..., tuple[Any, Tensor]]]:
    """The forward operators in PyTorch's own operations, for `torch.export.ExportedProgram.run_decompositions`.

    A program decomposed by this table needs neither this package nor Python where it runs (AOTInductor, C++), and pays with
    separate products. Dropout is the same mask, drawn by integer arithmetic that is slow outside a compiler. `dash_experts`,
    whose loop depends on the route, is not in the table: merge the experts.
    """

    def dash_linear(x: Tensor, weight: Tensor, bias: Tensor | None, *arguments: Any) -> tuple[Tensor, Tensor]:
        return _updated(F.linear(x, weight, bias), x, *arguments[:-1])

    def low_rank_update(y: Tensor, x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
        return _updated(y, x, *arguments[:-1])

    def dash_linear_group(x: Tensor, *arguments: Any) -> tuple[list[Tensor], Tensor]:
        *lists, seed, scaling, threshold, _ = arguments
        results = []
        for weight, bias, a, b, u, vt, sigma, scale in zip(*lists, scaling, strict=True):
            directions = (u, vt, sigma) if sigma.numel() else (None, None, None)
            base = F.linear(x, weight, bias if bias.numel() else None)
            results.append(_updated(base, x, a, b, *directions, seed, scale, threshold))
        return [y for y, _ in results], torch.cat([p for _, p in results], 1)

    found = (dash_linear, low_rank_update, dash_linear_group)
    return {getattr(torch.ops.loradash, formula.__name__).default: formula for formula in found}
