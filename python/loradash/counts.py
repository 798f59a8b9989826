"""How many parameters of a model train, and where."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from . import zero
from .state import dash_layers, parameter_of, parked_parameters, unwrap


@dataclass(frozen=True)
class Summary:
    """Counts of parameters."""

    layers: int
    adapters: int
    other_trainable: int
    total: int

    def __str__(self) -> str:
        trainable = self.adapters + self.other_trainable
        return (
            f"{self.layers} layers adapted; {trainable:,} of {self.total:,} parameters train "
            f"({100 * trainable / max(self.total, 1):.2f}%): {self.adapters:,} in adapters, {self.other_trainable:,} elsewhere"
        )


def summary(model: nn.Module) -> Summary:
    """How many parameters train, and where."""
    layers = dash_layers(model)
    ours = {id(parameter_of(p)) for m in layers.values() for p in (m.lora_a, m.lora_b, m.dash_sigma)}
    ours |= {id(p) for _, p in parked_parameters(model)}
    parameters = list(unwrap(model).parameters())
    sizes = [(p, zero.number_of_elements(p)) for p in parameters]
    adapters = sum(size for p, size in sizes if id(p) in ours and p.requires_grad)
    other = sum(size for p, size in sizes if id(p) not in ours and p.requires_grad)
    return Summary(len(layers), adapters, other, sum(size for _, size in sizes))
