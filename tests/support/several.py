"""A small network with several adapters, each with something in every term."""

from __future__ import annotations

import loradash
import torch
from loradash import DashConfig
from torch import nn
from torch.nn import functional as F

BASE = DashConfig(r=3, directions=2, prelaunch_steps=2, target_modules=["0", "2"])
OTHER = DashConfig(r=2, alpha=6, directions=3, prelaunch_steps=3, target_modules=["2", "4"])
X = torch.randn(6, 5, 20, generator=torch.Generator().manual_seed(1))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 20), nn.Tanh(), nn.Linear(20, 3))


def filled(model: nn.Module, seed: int = 0, std: float = 0.2) -> nn.Module:
    """Random numbers in all terms of all adapters, active and parked; launched."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            for name in ("lora_a", "lora_b", "dash_sigma", "dash_u", "dash_vt"):
                tensor = module._parameters.get(name, module._buffers.get(name))
                if tensor is not None:
                    tensor.copy_(std * torch.randn(tensor.shape, generator=generator))
            if "launched" in module._buffers:
                module._buffers["launched"].fill_(True)
    return model


def two(**settings: DashConfig) -> nn.Module:
    """Adapters "default" (layers 0 and 2) and "b" (2 and 4), or those of other settings by name; filled."""
    model = loradash.apply_dash(network(), settings.pop("default", BASE))
    for name, config in (settings or {"b": OTHER}).items():
        loradash.add_adapter(model, name, config)
    return filled(model)


def alone(model: nn.Module, name: str | None, x: torch.Tensor = X) -> torch.Tensor:
    """What a model gives with one adapter, or none."""
    before = loradash.active_adapter(model)
    if name is None:
        with loradash.disable(model):
            return model(x)
    loradash.set_adapter(model, name)
    y = model(x)
    loradash.set_adapter(model, before)
    return y


def formula(model: nn.Module, name: str, x: torch.Tensor = X) -> torch.Tensor:
    """The same in float64, from the tensors of one adapter and nothing else of ours."""
    y = x.double()
    for layer in model:
        if isinstance(layer, nn.Linear | loradash.DashLinear):
            out = F.linear(y, layer.weight.double(), layer.bias.double())
            if isinstance(layer, loradash.DashLinear) and name in layer.adapters:
                a, b, sigma, u, vt = (
                    layer.part(name, key).double() for key in ("lora_a", "lora_b", "dash_sigma", "dash_u", "dash_vt")
                )
                out = out + layer.config_of(name).scaling * (y @ a.t() @ b.t()) + (y @ vt.t() * sigma) @ u.t()
            y = out
        else:
            y = layer(y)
    return y.float()
