"""The layers that are compared, all around one frozen linear layer, and the shapes they are compared at."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from loradash import DashConfig, DashLinear
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from examples.sentiment.baselines import DenseDash, FactoredDash

# Each shape is (M, K, N).
SHAPES = ((512, 1024, 1024), (2048, 768, 768), (512, 2048, 2048), (256, 4096, 4096))
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
RANK, DIRECTIONS, ALPHA, DROPOUT = 16, 8, 32, 0.05

VARIANTS = ("frozen nn.Linear", "PEFT LoRA", "paper's form", "factored, eager", "factored, compiled", "ours")
FROZEN, PEFT, DENSE, FACTORED, COMPILED, OURS = VARIANTS


@dataclass
class Case:
    """One variant at one shape: the layer, its input (M, K), requiring grad, and the gradient of its output (M, N)."""

    layer: nn.Module
    x: Tensor
    dy: Tensor

    def __post_init__(self) -> None:
        self.leaves = [self.x, *(p for p in self.layer.parameters() if p.requires_grad)]

    def forward(self) -> Tensor:
        return self.layer(self.x)

    def step(self) -> None:
        """Forward and backward; gradients are dropped, as by zero_grad between steps."""
        self.forward().backward(self.dy)
        for leaf in self.leaves:
            leaf.grad = None

    def saved_bytes(self) -> int:
        """Bytes kept for backward beside x, parameters and buffers."""
        known = {t.untyped_storage().data_ptr() for t in (self.x, *self.layer.parameters(), *self.layer.buffers())}
        seen: dict[int, int] = {}

        def pack(t: Tensor) -> Tensor:
            storage = t.untyped_storage()
            if storage.data_ptr() not in known:
                seen[storage.data_ptr()] = storage.nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = self.forward()
        del y
        return sum(seen.values())


def flops(m: int, k: int, n: int) -> int:
    """FLOPs of a frozen linear layer, forward and backward; the low-rank terms add 2 M (2 R + r)(K + N)."""
    return 4 * m * k * n


def _peft(linear: nn.Linear, dropout: float) -> nn.Module:
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=dropout, target_modules=["0"])
    return get_peft_model(nn.Sequential(linear), config, autocast_adapter_dtype=False).base_model.model[0]


def _ours(linear: nn.Linear, dropout: float) -> DashLinear:
    layer = DashLinear.from_linear(linear, DashConfig(r=RANK, alpha=ALPHA, directions=DIRECTIONS, dropout=dropout))
    # The layer is as after launch: its directions are orthonormal and its coordinates are not zero.
    with torch.no_grad():
        layer.dash_u.copy_(torch.linalg.qr(torch.randn_like(layer.dash_u))[0])
        layer.dash_vt.copy_(torch.linalg.qr(torch.randn_like(layer.dash_vt.mT))[0].mT)
        layer.dash_sigma.normal_()
    return layer


def build(
    shape: tuple[int, int, int], dtype: torch.dtype, names: Iterable[str] = VARIANTS, dropout: float = DROPOUT
) -> dict[str, Case]:
    """Every variant by name, each with its own copy of one linear layer and one input."""
    m, k, n = shape
    torch.manual_seed(0)
    linear = nn.Linear(k, n, bias=False, dtype=dtype).requires_grad_(False)
    x, dy = torch.randn(m, k, dtype=dtype), torch.randn(m, n, dtype=dtype)
    scaling = ALPHA / RANK
    makers: dict[str, Callable[[nn.Linear], nn.Module]] = {
        FROZEN: lambda layer: layer,
        PEFT: lambda layer: _peft(layer, dropout),
        DENSE: lambda layer: DenseDash(layer, RANK, DIRECTIONS, scaling, dropout),
        FACTORED: lambda layer: FactoredDash(layer, RANK, DIRECTIONS, scaling, dropout),
        COMPILED: lambda layer: torch.compile(FactoredDash(layer, RANK, DIRECTIONS, scaling, dropout)),
        OURS: lambda layer: _ours(layer, dropout),
    }
    return {name: Case(makers[name](copy.deepcopy(linear)), x.clone().requires_grad_(), dy) for name in names}
