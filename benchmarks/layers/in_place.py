"""LoRA by an autograd function that adds into the base product in place: the scheme of Unsloth's fused layers (2026.10).

Written after their `matmul_lora` and `LoRA_W`, not copied: XW, then addmm_ of the low-rank product; with dropout the mask is
saved, and the dropped x is made again in backward. No dash term.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn


def _replayed(t: Tensor, mask: Tensor, p: float, scale: float = 1.0) -> Tensor:
    """scale * t * mask / (1 - p)."""
    return torch.ops.aten.native_dropout_backward(t, mask, scale / (1.0 - p))


class InPlaceLora(torch.autograd.Function):
    """y = x Wᵀ + scaling · x̃ Aᵀ Bᵀ."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scaling: float, p: float) -> Tensor:
        dropped, mask = torch.native_dropout(x, p, True) if p else (x, None)
        y = x @ weight.t()
        y.addmm_(dropped @ a.t(), b.t(), alpha=scaling)
        ctx.save_for_backward(x, weight, a, b, mask)
        ctx.scaling, ctx.p = scaling, p
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, a, b, mask = ctx.saved_tensors
        g = dy @ b
        dropped = x if mask is None else _replayed(x, mask, ctx.p)
        da, db = torch.empty_like(a.t()), torch.empty_like(b.t())
        da.addmm_(dropped.t(), g, alpha=ctx.scaling, beta=0)
        db.addmm_(a @ dropped.t(), dy, alpha=ctx.scaling, beta=0)
        dx = dy @ weight
        if mask is None:
            dx.addmm_(g, a, alpha=ctx.scaling)
        else:
            dx.add_(_replayed(g @ a, mask, ctx.p, ctx.scaling))
        return dx, None, da.t(), db.t(), None, None


class InPlaceLoraLinear(nn.Module):
    """A frozen linear layer without bias and its LoRA, in the dtype of the weight."""

    def __init__(self, linear: nn.Linear, r: int, scaling: float, dropout: float) -> None:
        super().__init__()
        n, k = linear.weight.shape
        self.weight = linear.weight
        self.lora_a = nn.Parameter(linear.weight.new_empty(r, k))
        self.lora_b = nn.Parameter(linear.weight.new_zeros(n, r))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))
        self.scaling, self.dropout = scaling, dropout

    def forward(self, x: Tensor) -> Tensor:
        p = self.dropout if self.training else 0.0
        return InPlaceLora.apply(x, self.weight, self.lora_a, self.lora_b, self.scaling, p)
