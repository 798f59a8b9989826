"""Base layers that keep their weight in a form of their own, as quantised ones do: told apart, and read as a matrix."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

ROWS = 1024  # of the identity at a time


def is_quantised(linear: nn.Module) -> bool:
    """Is the weight something else than plain floating numbers (bitsandbytes, torchao, ...)?"""
    weight = getattr(linear, "weight", None)
    if not isinstance(weight, Tensor):
        return False
    return not weight.is_floating_point() or type(weight).dequantize is not Tensor.dequantize


@torch.no_grad()
def dequantised(linear: nn.Module, in_features: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The weight (N, K) that a linear module multiplies with, from its products with the identity.

    Whatever the format is, this is the W of the layer's own outputs. The module is left alone: it may be in use.
    """
    twin = copy.copy(linear)
    twin._parameters = {**linear._parameters, "bias": None}
    columns = [
        twin(torch.eye(min(ROWS, in_features - k0), in_features, dtype=dtype, device=device).roll(k0, -1))
        for k0 in range(0, in_features, ROWS)
    ]
    return torch.cat(columns).t()
