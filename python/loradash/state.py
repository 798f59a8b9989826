"""What `apply_dash` leaves on a model, and how it is found again, whatever the model was wrapped in since."""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import nn

from .config import DashConfig
from .linear import DashLinear

STATE = "_loradash_state"
"""The attribute of the adapted model that holds its `DashState`."""

_WRAPPERS = re.compile(r"(^|\.)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)(?=\.|$)")


@dataclass
class DashState:
    """What a run must remember besides tensors; travels with the model and in the adapter file.

    Attributes:
        step: optimizer steps taken.
        dash_only: are A and B frozen?
        schedules: how many were made for this model; the last one counts.
    """

    config: DashConfig
    step: int = 0
    dash_only: bool = False
    schedules: int = 0

    def claim(self) -> int:
        """The number of a new schedule."""
        self.schedules += 1
        return self.schedules


def unwrap(model: nn.Module) -> nn.Module:
    """The module that `apply_dash` was called on, wherever it sits in `model` (inside DistributedDataParallel, an engine,
    torch.compile, a larger model); `model` itself where there is none. Raises ValueError where there are several."""
    found = [module for module in model.modules() if STATE in module.__dict__]
    if len(found) > 1:
        kinds = ", ".join(type(module).__name__ for module in found)
        raise ValueError(f"{len(found)} parts of the model were adapted apart ({kinds}); pass one of them")
    return found[0] if found else model


def dash_state(model: nn.Module) -> DashState:
    """The state that `apply_dash` left on a model. Raises ValueError where there is none."""
    state = unwrap(model).__dict__.get(STATE)
    if state is None:
        raise ValueError("the model has no LoRA-Dash adapters; call apply_dash(model, config) first")
    return state


def plain_name(name: str) -> str:
    """A module's name without the names that torch.compile, FSDP and activation checkpointing put into it."""
    return _WRAPPERS.sub("", name).lstrip(".")


def dash_layers(model: nn.Module) -> dict[str, DashLinear]:
    """All adapted layers by plain name; a layer that occurs twice, under its first name."""
    return {plain_name(name): m for name, m in unwrap(model).named_modules() if isinstance(m, DashLinear)}
