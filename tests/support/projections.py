"""A model whose layers read one tensor, for tests of groups."""

from __future__ import annotations

import torch
from loradash import DashConfig, apply_dash, dash_layers
from torch import nn

QKV = ("q_proj", "k_proj", "v_proj")


class Attention(nn.Module):
    """Three projections; `between` is called before the second."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(16, n) for n in (16, 8, 8))
        self.between = self.order = None

    def forward(self, x, memory=None, skip=()):
        memory, found = x if memory is None else memory, {}
        for name in self.order or QKV:
            if name not in skip:
                found[name] = getattr(self, name)(x if name == "q_proj" else memory)
            if self.between is not None and name == "q_proj":
                self.between(x)
        return [found[name] for name in QKV if name in found]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()

    def forward(self, x, *args, **kwargs):
        return self.attention(x, *args, **kwargs)


def adapted(dropout=0.0, **options):
    torch.manual_seed(0)
    model = apply_dash(Model(), DashConfig(r=4, directions=3, dropout=dropout, **options))
    with torch.no_grad():
        for layer in dash_layers(model).values():
            for t in (layer.lora_b, layer.dash_sigma, layer.dash_u, layer.dash_vt):
                t.normal_(std=0.3)
    return model


def step(model, *args, **kwargs):
    """Outputs and all gradients, that of x first."""
    torch.manual_seed(5)
    x = torch.randn(3, 5, 16, requires_grad=True)
    outputs = model(x, *args, **kwargs)
    model.zero_grad()
    torch.autograd.backward([y.square().sum() for y in outputs])
    return [*outputs, x.grad, *(p.grad for p in model.parameters() if p.grad is not None)]
