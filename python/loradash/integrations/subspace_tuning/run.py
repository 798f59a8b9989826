"""The run's settings and state, which the authors' code keeps nowhere: read from a model's layers and what trains beside them."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from ...config import OVERRIDABLE, DashConfig
from ...state import DashState
from .layers import AuthorsLayer

_COMMON = {"warmup": "prelaunch_steps", "lora_dropout": "dropout"}
"""What a run has one of, by the name of theirs and ours."""


class CountedState(DashState):
    """The state of a model whose layers count their own forward calls: its step is their count.

    Raises ValueError where the layers disagree, and for a DashSchedule.
    """

    def __init__(self, config: DashConfig, layers: Mapping[str, AuthorsLayer]) -> None:
        # The base class sets a step of 0, which is not the layers'.
        self._layers: dict[str, AuthorsLayer] = {}
        super().__init__(config)
        self._layers = dict(layers)

    @property
    def step(self) -> int:
        counts = {name: layer.FLAG for name, layer in self._layers.items()}
        return one_of(counts, "FLAG", "their state dict keeps every layer's own") if counts else 0

    @step.setter
    def step(self, step: int) -> None:
        for layer in self._layers.values():
            layer.note_phase(layer.is_launched(), step)

    def claim(self) -> int:
        raise ValueError(
            "the layers count their own forward calls and launch themselves (semantics='authors'); DashSchedule is for "
            "semantics='loradash'"
        )


def one_of(values: Mapping[str, Any], what: str, hint: str) -> Any:
    """The value that all layers have. Raises ValueError, naming two that differ."""
    items = list(values.items())
    other = next((item for item in items if item[1] != items[0][1]), None)
    if other is not None:
        raise ValueError(f"{what} is {items[0][1]} in {items[0][0]} and {other[1]} in {other[0]}: {hint}")
    return items[0][1]


def run_config(settings: Mapping[str, DashConfig], trainable: Iterable[str] = ()) -> DashConfig:
    """One `DashConfig` for layers with settings of their own: what most have, and overrides for the others.

    trainable: names of modules that train as a whole. Raises ValueError where dropout or prelaunch_steps differ, which a run
    has one of.
    """
    for theirs, ours in _COMMON.items():
        values = {name: getattr(s, ours) for name, s in settings.items()}
        one_of(values, f"{theirs} ({ours})", "one run has one of it")
    own = {name: {key: getattr(s, key) for key in OVERRIDABLE} for name, s in settings.items()}
    common = dict(Counter(tuple(values.items()) for values in own.values()).most_common(1)[0][0])
    first = next(iter(settings.values()))
    return DashConfig(
        **common,
        prelaunch_steps=first.prelaunch_steps,
        dropout=first.dropout,
        use_rslora=first.use_rslora,
        target_modules="|".join(re.escape(name) for name in settings),
        trainable_modules="|".join(re.escape(name) for name in trainable) or None,
        overrides={re.escape(name): values for name, values in own.items() if values != common},
        train_bias=any(s.train_bias for s in settings.values()),
    )


def trained_modules(model: nn.Module, layers: Iterable[nn.Module]) -> list[str]:
    """Names of the modules outside of the adapted layers whose own parameters train.

    Warns, naming the parameter, of a module that trains in part: an adapter's file keeps whole modules.
    """
    inside = {id(m) for layer in layers for m in layer.modules()}
    found = []
    for name, module in model.named_modules():
        own = dict(module.named_parameters(name, recurse=False))
        trains = {key for key, parameter in own.items() if parameter.requires_grad}
        if id(module) in inside or not trains:
            continue
        if trains != set(own):
            warnings.warn(
                f"loradash: {min(trains)} trains and {min(set(own) - trains)} does not: save_adapter keeps modules that train "
                "as a whole, and nothing of this one; save the model's state dict",
                stacklevel=4,
            )
            continue
        found.append(name)
    return found
