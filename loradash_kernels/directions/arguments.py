"""Checks of the arguments of this room's functions, and the flat batch that they work on."""

from __future__ import annotations

import torch
from torch import Tensor

from .linalg import all_finite
from .policy import METHODS


def checked_weight(weight: Tensor, method: str) -> Tensor:
    """The weights (..., N, K) as a batch (L, N, K), in float32 or, where they are, float64."""
    _check_weight(weight, method)
    return _flattened(weight=weight)[0]


def checked_batch(weight: Tensor, lora_a: Tensor, lora_b: Tensor, method: str) -> tuple[Tensor, Tensor, Tensor]:
    """Weights and factors as a batch, in float32 or, where any is, float64: (L, N, K), (L, r, K), (L, N, r)."""
    _check_weight(weight, method)
    *batch, n, k = weight.shape
    r = lora_a.shape[-2] if lora_a.dim() >= 2 else 0
    if r == 0 or lora_a.shape != (*batch, r, k):
        raise ValueError(
            f"lora_a has shape {tuple(lora_a.shape)}; wanted ({', '.join(map(str, (*batch, 'r >= 1', k)))})"
        )
    if lora_b.shape != (*batch, n, r):
        raise ValueError(f"lora_b has shape {tuple(lora_b.shape)}; wanted {(*batch, n, r)}")
    w, a, b = _flattened(weight=weight, lora_a=lora_a, lora_b=lora_b)
    return w, a, b


def _check_weight(weight: Tensor, method: str) -> None:
    if method not in METHODS:
        raise ValueError(f"method must be one of {METHODS}, got {method!r}")
    if weight.dim() < 2:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; wanted (..., N, K)")


def _flattened(**tensors: Tensor) -> list[Tensor]:
    for name, t in tensors.items():
        if not all_finite(t):
            raise ValueError(f"{name} has values that are not finite")
    dtype = torch.float64 if any(t.dtype == torch.float64 for t in tensors.values()) else torch.float32
    with torch.no_grad():
        return [t.detach().to(dtype).reshape(-1, *t.shape[-2:]) for t in tensors.values()]
