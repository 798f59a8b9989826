"""MergedLinear of loralib and of CR_MR's fork of PEFT: plain LoRA on some of the projections that one weight holds.

Their forward multiplies x with A once for each enabled projection, forms the update of the whole weight (loralib) or convolves
in groups (CR_MR), and pads it with zeros. Here the projections are members of one group, whose weights are views of the one.
"""

from __future__ import annotations

from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from loradash_kernels.group import GroupMember, dash_linear_group

from .layers import patched_class

NAME = "MergedLinear"


class MergedLayer(nn.Module):
    """A MergedLinear computed by `dash_linear_group`: a member for each of its projections, of rank 0 where it is not enabled.

    It has no directions and no launch: parameters, state dict, and merging in eval are its own class's.
    """

    origin: ClassVar[tuple[type[nn.Module], type[nn.Module]]]

    def forward(self, x: Tensor) -> Tensor:
        """x (..., K) to (..., N)."""
        layer = cast(Any, self)
        if layer.merged or getattr(layer, "disable_adapters", False):
            return super().forward(x)
        drop = float(getattr(layer.lora_dropout, "p", 0.0))
        return torch.cat(dash_linear_group(x, members_of(layer), dropout_p=drop, training=self.training), -1)


def members_of(layer: Any) -> list[GroupMember]:
    """The projections of a MergedLinear, in the order of their rows of the weight."""
    enabled: list[bool] = list(layer.enable_lora)
    weight = layer.weight.t() if layer.fan_in_fan_out else layer.weight
    a, b = _factors(layer)
    parts_a, parts_b = iter(a.split(layer.r)), iter(b.split(weight.shape[0] // len(enabled)))
    biases = [None] * len(enabled) if layer.bias is None else layer.bias.chunk(len(enabled))
    members = []
    for part, bias, on in zip(weight.chunk(len(enabled)), biases, enabled, strict=True):
        lora_a, lora_b = (next(parts_a), next(parts_b)) if on else (a[:0], b.new_empty(part.shape[0], 0))
        members.append(GroupMember(weight=part, bias=bias, lora_a=lora_a, lora_b=lora_b, scaling=float(layer.scaling)))
    return members


def _factors(layer: Any) -> tuple[Tensor, Tensor]:
    """A (e r, K) and B (e N / g, r), e of g projections enabled. CR_MR's are the weights of nn.Linear and nn.Conv1d."""
    a, b = layer.lora_A, layer.lora_B
    return (a, b) if isinstance(a, Tensor) else (a.weight, b.weight.squeeze(-1))


def is_merged_linear(module: nn.Module) -> bool:
    """Is it theirs, with adapters?"""
    if type(module).__name__ != NAME or not isinstance(module, nn.Linear):
        return False
    return all(hasattr(module, name) for name in ("lora_A", "lora_B", "enable_lora", "merged", "fan_in_fan_out"))


def hindrance(module: Any) -> str | None:
    """Why its projections cannot be members of a group; None where they can."""
    enabled, n = list(module.enable_lora), module.weight.shape[1 if module.fan_in_fan_out else 0]
    if n % len(enabled):
        return f"{n} outputs for {len(enabled)} projections"
    a, b = _factors(module)
    wanted = (module.r * sum(enabled), n // len(enabled) * sum(enabled), module.r)
    found = (a.shape[0], *b.shape)
    # The fork's convolution has two groups whatever is enabled.
    return (
        None
        if found == wanted
        else f"A has {a.shape[0]} rows and B the shape {tuple(b.shape)}, not r for each projection"
    )


def adopt_merged(module: nn.Module) -> None:
    """Makes it compute by the group operator."""
    module.__class__ = patched_class(MergedLayer, type(module))


def release_merged(module: nn.Module) -> None:
    """Gives it its own class back."""
    module.__class__ = cast(MergedLayer, module).origin[1]
