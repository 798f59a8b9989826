"""What a call of an operator is made of."""

from __future__ import annotations

import torch


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums, of P and of gradients before they are rounded: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
