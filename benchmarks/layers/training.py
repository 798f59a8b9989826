"""A whole training step of a few decoder layers of LLaMA 8B's widths: attention, norms, MLP, the adapters' optimizer.

Tokens/s are those of this stack, not of a model of 32 layers: embedding and head are left out, and nothing is extrapolated.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.layers.variants import DIRECTIONS, DROPOUT, FROZEN, OURS, PEFT, RANK, SCALING

ADAPTED = ("q", "k", "v", "o", "gate", "up", "down")


@dataclass(frozen=True)
class Sizes:
    """The sizes of a stack and of the batch that trains it; LLaMA 8B's unless given."""

    hidden: int = 4096
    inner: int = 14336
    heads: int = 32
    key_heads: int = 8
    layers: int = 2
    batch: int = 2
    tokens: int = 2048
    dtype: torch.dtype = torch.bfloat16

    def __str__(self) -> str:
        return f"{self.layers} layers of {self.hidden}, {self.inner}; {self.batch} x {self.tokens} tokens"


SMALL = Sizes(hidden=64, inner=128, heads=4, key_heads=2, layers=1, batch=1, tokens=32, dtype=torch.float32)


class Decoder(nn.Module):
    """A decoder layer as LLaMA's: x (B, T, hidden)."""

    def __init__(self, sizes: Sizes, device: torch.device) -> None:
        super().__init__()
        hidden, inner = sizes.hidden, sizes.inner
        self.head = hidden // sizes.heads
        narrow = sizes.key_heads * self.head

        def linear(k: int, n: int) -> nn.Linear:
            return nn.Linear(k, n, bias=False, device=device, dtype=sizes.dtype)

        self.q, self.k, self.v = linear(hidden, hidden), linear(hidden, narrow), linear(hidden, narrow)
        self.o, self.gate, self.up = linear(hidden, hidden), linear(hidden, inner), linear(hidden, inner)
        self.down = linear(inner, hidden)
        self.norms = nn.ModuleList(nn.RMSNorm(hidden, device=device, dtype=sizes.dtype) for _ in range(2))
        angles = torch.outer(torch.arange(sizes.tokens), 500000.0 ** -(torch.arange(0, self.head, 2) / self.head))
        turns = torch.cat((angles, angles), -1)
        self.register_buffer("cosine", turns.cos().to(device, sizes.dtype), persistent=False)
        self.register_buffer("sine", turns.sin().to(device, sizes.dtype), persistent=False)

    def _heads(self, t: Tensor) -> Tensor:
        return t.unflatten(-1, (-1, self.head)).transpose(1, 2)

    def _turned(self, t: Tensor) -> Tensor:
        first, second = t.chunk(2, -1)
        return t * self.cosine + torch.cat((-second, first), -1) * self.sine

    def forward(self, x: Tensor) -> Tensor:
        h = self.norms[0](x)
        q, k, v = self._turned(self._heads(self.q(h))), self._turned(self._heads(self.k(h))), self._heads(self.v(h))
        groups = q.shape[1] // k.shape[1]
        k, v = (t.repeat_interleave(groups, 1) for t in (k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(mixed.transpose(1, 2).flatten(2))
        h = self.norms[1](x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


def _peft(model: nn.Module) -> nn.Module:
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(r=RANK, lora_alpha=SCALING * RANK, lora_dropout=DROPOUT, target_modules=list(ADAPTED))
    return inject_adapter_in_model(config, model)


def _ours(model: nn.Module) -> nn.Module:
    import loradash

    config = loradash.DashConfig(
        r=RANK, alpha=SCALING * RANK, directions=DIRECTIONS, dropout=DROPOUT, target_modules=list(ADAPTED)
    )
    model = loradash.apply_dash(model, config)
    with torch.no_grad():
        for layer in loradash.dash_layers(model).values():
            layer.dash_u.normal_(std=layer.out_features**-0.5)
            layer.dash_vt.normal_(std=layer.in_features**-0.5)
    return model


ADAPT: dict[str, Callable[[nn.Module], nn.Module]] = {FROZEN: lambda model: model, PEFT: _peft, OURS: _ours}


def training_step(name: str, sizes: Sizes, device: torch.device) -> Callable[[], None]:
    """A step of a fresh stack that is adapted in this way: forward, backward, AdamW of what trains. x requires grad, as the
    output of a layer below would.

    Raises AssertionError where a step leaves anything that trains without a gradient or with one that is not finite.
    """
    torch.manual_seed(0)
    stack = nn.Sequential(*(Decoder(sizes, device) for _ in range(sizes.layers))).requires_grad_(False)
    stack = ADAPT[name](stack)
    parameters = [p for p in stack.parameters() if p.requires_grad]
    assert bool(parameters) == (name != FROZEN), f"{len(parameters)} parameters of {name!r} train"
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, foreach=True) if parameters else None
    shape = (sizes.batch, sizes.tokens, sizes.hidden)
    x = torch.randn(shape, device=device, dtype=sizes.dtype, requires_grad=True)
    dy = torch.randn(shape, device=device, dtype=sizes.dtype)

    def passes() -> None:
        stack(x).backward(dy)

    passes()
    for parameter in (x, *parameters):
        assert parameter.grad is not None and parameter.grad.isfinite().all(), "a gradient is missing or not finite"

    def step() -> None:
        x.grad = None
        if optimizer is not None:
            optimizer.zero_grad()
        passes()
        if optimizer is not None:
            optimizer.step()

    return step
