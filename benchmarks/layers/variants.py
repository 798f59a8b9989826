"""The layers that are compared, all around one frozen linear layer, and the shapes they are compared at."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from loradash import DashConfig, DashLinear
from torch import Tensor, nn

from benchmarks.layers.in_place import InPlaceLoraLinear
from benchmarks.support.measure import saved_bytes
from examples.sentiment.baselines import DenseDash, FactoredDash

# Each shape is (M, K, N).
SHAPES = ((512, 1024, 1024), (2048, 768, 768), (512, 2048, 2048), (256, 4096, 4096))
# On a GPU a layer of these sizes is all launching; LLaMA's first linear layers are not.
GPU_SHAPES = ((4096, 4096, 4096), (8192, 4096, 4096), (4096, 4096, 11008), (4096, 11008, 4096))
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
RANK, DIRECTIONS, ALPHA, DROPOUT = 16, 8, 32, 0.05
SCALING = ALPHA / RANK

VARIANTS = (
    "frozen nn.Linear",
    "PEFT LoRA",
    "paper's form",
    "factored, eager",
    "factored, compiled",
    "addmm_ in place",
    "ours",
)
FROZEN, PEFT, DENSE, FACTORED, COMPILED, IN_PLACE, OURS = VARIANTS


@dataclass
class Case:
    """One variant at one shape: the layer, its input (M, K), requiring grad, and the gradient of its output (M, N).

    within: what forward and backward run within, a strategy that is forced say.
    """

    layer: nn.Module
    x: Tensor
    dy: Tensor
    within: Callable[[], contextlib.AbstractContextManager] = field(default=contextlib.nullcontext)
    y: Tensor | None = None

    def __post_init__(self) -> None:
        self.leaves = [self.x, *(p for p in self.layer.parameters() if p.requires_grad)]

    def forward(self) -> Tensor:
        with self.within():
            return self.layer(self.x)

    def keep_forward(self) -> None:
        """Runs forward and keeps its output, for `backward`."""
        self.y = self.forward()

    def backward(self) -> None:
        """Takes the output that was kept."""
        assert self.y is not None, "keep_forward comes before backward"
        y, self.y = self.y, None
        with self.within():
            y.backward(self.dy)
        self.drop_gradients()

    def drop_gradients(self) -> None:
        for leaf in self.leaves:
            leaf.grad = None

    def step(self) -> None:
        """Forward and backward; gradients are dropped, as by zero_grad between steps."""
        with self.within():
            self.layer(self.x).backward(self.dy)
        self.drop_gradients()

    def saved_bytes(self) -> int:
        """Bytes kept for backward beside x, parameters and buffers."""
        return saved_bytes(self.forward, (self.x, *self.layer.parameters(), *self.layer.buffers()))


def flops(m: int, k: int, n: int) -> int:
    """FLOPs of a frozen linear layer, forward and backward; the low-rank terms add 2 M (2 R + r)(K + N)."""
    return 4 * m * k * n


def _peft(linear: nn.Linear, rank: int, dropout: float) -> nn.Module:
    # Not every machine that the others are timed on has PEFT.
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, lora_alpha=SCALING * rank, lora_dropout=dropout, target_modules=["0"])
    return get_peft_model(nn.Sequential(linear), config, autocast_adapter_dtype=False).base_model.model[0]


def ours(linear: nn.Linear, rank: int, dropout: float) -> DashLinear:
    """A layer as after launch: its directions are orthonormal and its coordinates are not zero."""
    layer = DashLinear.from_linear(
        linear, DashConfig(r=rank, alpha=SCALING * rank, directions=DIRECTIONS, dropout=dropout)
    )
    with torch.no_grad():
        layer.dash_u.copy_(torch.linalg.qr(torch.randn_like(layer.dash_u))[0])
        layer.dash_vt.copy_(torch.linalg.qr(torch.randn_like(layer.dash_vt.mT))[0].mT)
        layer.dash_sigma.normal_()
    return layer


def _trained(layer: nn.Module) -> nn.Module:
    """With B and coordinates that are not zero, as after some steps: a product with zeros can hide a mistake, and takes less
    power."""
    with torch.no_grad():
        for parameter in layer.parameters():
            if parameter.requires_grad and not parameter.any():
                parameter.normal_(std=0.1)
    return layer


@dataclass
class Inputs:
    """What all variants at a shape share: the weight (N, K), x (M, K) and the gradient of the output (M, N)."""

    weight: Tensor
    x: Tensor
    dy: Tensor


def make_inputs(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device | str = "cpu") -> Inputs:
    m, k, n = shape
    torch.manual_seed(0)
    weight = nn.Linear(k, n, bias=False, dtype=dtype, device=device).weight.detach()
    return Inputs(weight, *(torch.randn(m, side, dtype=dtype, device=device) for side in (k, n)))


def make_case(
    name: str, inputs: Inputs, dropout: float = DROPOUT, rank: int = RANK, compiler: str = "inductor"
) -> Case:
    """One variant. compiler: the backend of torch.compile for the variant that is compiled."""
    n, k = inputs.weight.shape
    linear = nn.Linear(k, n, bias=False, device="meta")
    linear.weight = nn.Parameter(inputs.weight, requires_grad=False)
    layer = {
        FROZEN: lambda: linear,
        PEFT: lambda: _peft(linear, rank, dropout),
        DENSE: lambda: DenseDash(linear, rank, DIRECTIONS, SCALING, dropout),
        FACTORED: lambda: FactoredDash(linear, rank, DIRECTIONS, SCALING, dropout),
        COMPILED: lambda: FactoredDash(linear, rank, DIRECTIONS, SCALING, dropout),
        IN_PLACE: lambda: InPlaceLoraLinear(linear, rank, SCALING, dropout),
        OURS: lambda: ours(linear, rank, dropout),
    }[name]()
    layer = _trained(layer)
    if name == COMPILED:
        layer = torch.compile(layer, backend=compiler, dynamic=False)
    return Case(layer, inputs.x.detach().requires_grad_(), inputs.dy)


def build(
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    names: Iterable[str] = VARIANTS,
    dropout: float = DROPOUT,
    device: torch.device | str = "cpu",
) -> dict[str, Case]:
    """Every variant by name, around one weight and one input that they share."""
    inputs = make_inputs(shape, dtype, device)
    return {name: make_case(name, inputs, dropout) for name in names}
