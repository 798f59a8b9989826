"""What LoRA-Dash costs elsewhere: the same layer as the paper's code computes it, and as plain PyTorch can at best.

For comparisons only: benchmarks and the demonstration time these next to `DashLinear`.
"""

from __future__ import annotations

import abc
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class AdaptedLinear(nn.Module, abc.ABC):
    """A frozen linear layer with the parameters of LoRA-Dash; subclasses say how the dash term is computed."""

    def __init__(self, linear: nn.Linear, r: int, s: int, scaling: float, dropout: float) -> None:
        super().__init__()
        n, k = linear.weight.shape
        self.weight, self.bias = linear.weight, linear.bias
        for frozen in (self.weight, self.bias):
            if frozen is not None:
                frozen.requires_grad_(False)
        options: Any = {"dtype": linear.weight.dtype, "device": linear.weight.device}
        self.lora_a = nn.Parameter(torch.empty(r, k, **options))
        self.lora_b = nn.Parameter(torch.zeros(n, r, **options))
        self.dash_sigma = nn.Parameter(torch.zeros(s, **options))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))
        self.register_buffer("dash_u", torch.linalg.qr(torch.randn(n, s))[0].to(**options))
        self.register_buffer("dash_vt", torch.linalg.qr(torch.randn(k, s))[0].mT.contiguous().to(**options))
        self.dropout = nn.Dropout(dropout)
        self.scaling = scaling

    @abc.abstractmethod
    def dash(self, x: Tensor) -> Tensor:
        """The dash term (..., N) of a dropped x (..., K)."""

    def forward(self, x: Tensor) -> Tensor:
        lora = self.dropout(x) @ self.lora_a.t() @ self.lora_b.t() * self.scaling
        return F.linear(x, self.weight, self.bias) + lora + self.dash(self.dropout(x))


class DenseDash(AdaptedLinear):
    """The form of the paper's code: U diag(Δσ) Vᵀ is formed densely in every step and multiplied with x."""

    def dash(self, x: Tensor) -> Tensor:
        return x @ (self.dash_u @ torch.diag(self.dash_sigma) @ self.dash_vt).t()


class FactoredDash(AdaptedLinear):
    """The same term through its factors, ((x V) * Δσ) Uᵀ, and one dropped x for both terms, as in `DashLinear`."""

    def forward(self, x: Tensor) -> Tensor:
        dropped = self.dropout(x)
        lora = dropped @ self.lora_a.t() @ self.lora_b.t() * self.scaling
        return F.linear(x, self.weight, self.bias) + lora + self.dash(dropped)

    def dash(self, x: Tensor) -> Tensor:
        return (x @ self.dash_vt.t() * self.dash_sigma) @ self.dash_u.t()


def replace_linears(
    model: nn.Module, form: type[AdaptedLinear], r: int, s: int, scaling: float, dropout: float
) -> nn.Module:
    """Puts `form` around every nn.Linear of a frozen model, in place."""
    model.requires_grad_(False)
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if type(child) is nn.Linear:
                parent._modules[name] = form(child, r, s, scaling, dropout)
    return model
