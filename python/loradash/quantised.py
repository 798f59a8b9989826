"""Layers that compute in a way of their own, quantised ones above all: the W that they stand for, whatever their format."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from .base_layers import PLAIN, computes_plainly, features, is_transposed

ROWS = 1024
"""A layer is asked for its products with this many rows of the identity at a time."""


def is_quantised(weight: Any) -> bool:
    """Is a weight something else than plain floating numbers (bitsandbytes, torchao, ...)?"""
    if not isinstance(weight, Tensor):
        return False
    return weight.dtype not in PLAIN or type(weight).dequantize is not Tensor.dequantize


def compute_device(module: nn.Module) -> torch.device:
    """Where a layer's outputs are: its weight's device, or the one that accelerate brings an offloaded weight to."""
    hook = module.__dict__.get("_hf_hook")
    device = getattr(hook, "execution_device", None)
    return torch.device(device) if device is not None else cast(Tensor, module.weight).device


@torch.no_grad()
def weight_of(module: nn.Module) -> Tensor:
    """The W (N, K) that a linear layer multiplies with: a view of its weight, or a new tensor every time (`_products`)."""
    weight = cast(Tensor, module.weight)
    if computes_plainly(module) and not weight.is_meta:
        return weight.t() if is_transposed(module) else weight
    return _products(module)


def _products(module: nn.Module) -> Tensor:
    """The layer's products with the identity, less that with zero: whatever its format is, the W (N, K) of its own outputs.

    Its hooks do not see these calls, unless the layer is called in a way of its own.
    """
    k, _ = features(module)
    weight, device = cast(Tensor, module.weight), compute_device(module)
    # Layers with codes for a weight take float32.
    dtype = weight.dtype if weight.dtype in PLAIN else torch.float32
    call = module.forward if type(module).__call__ is nn.Module.__call__ else module
    with torch.autocast(device.type, enabled=False):
        offset = call(torch.zeros(1, k, dtype=dtype, device=device))
        columns = [
            call(torch.eye(min(ROWS, k - k0), k, dtype=dtype, device=device).roll(k0, -1)) - offset
            for k0 in range(0, k, ROWS)
        ]
    return torch.cat(columns).t()


def can_take_update(module: nn.Module) -> bool:
    """Is adding to a layer's weight adding to its products? A layer with a forward of its own is asked for these."""
    weight = module._parameters.get("weight")
    if type(weight) is not nn.Parameter or weight.dtype not in PLAIN or weight.dim() != 2:
        return False
    if computes_plainly(module):
        return True
    own = weight.t() if is_transposed(module) else weight
    rounding = 2 * torch.finfo(weight.dtype).eps
    return torch.allclose(weight_of(module).double(), own.double(), rtol=rounding, atol=rounding)
