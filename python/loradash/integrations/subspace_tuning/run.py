"""The run's settings and state, which the authors' code keeps nowhere: read from a model's layers and what trains beside them."""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from ...config import OVERRIDABLE, DashConfig
from ...distributed import is_sharded
from ...state import STATE, DashState
from .kinds import SdgHost
from .layers import AuthorsLayer

_COMMON = {"warmup": "prelaunch_steps", "lora_dropout": "dropout"}
"""What a run has one of, by the name of theirs and ours."""


class ScheduledState(DashState):
    """The state of a model with `AuthorsLayer`s that a schedule steps. What else trains is often said after it was made: it is
    read again when the schedule is."""

    def __init__(self, model: nn.Module, layers: Mapping[str, AuthorsLayer], step: int) -> None:
        super().__init__(settings_of_run(model, layers), step)
        self._model, self._layers = model, dict(layers)

    def claim(self) -> int:
        for name, layer in self._layers.items():
            if is_sharded(layer.stored("dash_sigma")) and not layer.has_sigma_whole():
                raise ValueError(
                    f"{name} is sharded (DTensor), and its delta sigma is not kept as one vector of its own size; convert its "
                    "checkpoint for apply_dash, whose layers can be sharded"
                )
        found = settings_of_run(self._model, self._layers)
        self.config = dataclasses.replace(found, svd=self.config.svd, bypassed=self.config.bypassed)
        return super().claim()


class CountedState(DashState):
    """The state of a model whose layers count their own forward calls: its step is their count, its settings are as they are.

    Raises ValueError where the layers disagree, and for a DashSchedule.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, AuthorsLayer]) -> None:
        # The base class sets settings and a step of 0, which are not the layers'.
        self._layers: dict[str, AuthorsLayer] = {}
        super().__init__(settings_of_run(model, layers))
        self._model, self._layers = model, dict(layers)

    @property
    def config(self) -> DashConfig:
        return settings_of_run(self._model, self._layers)

    @config.setter
    def config(self, config: DashConfig) -> None:
        """Those of an adapter's file are given to the layers themselves."""

    @property
    def step(self) -> int:
        counts = {name: layer.FLAG for name, layer in self._layers.items()}
        return one_of(counts, "FLAG", "their state dict keeps every layer's own")

    @step.setter
    def step(self, step: int) -> None:
        for layer in self._layers.values():
            layer.note_phase(layer.is_launched(), step)

    def refuse_shards(self) -> None:
        """Raises ValueError where FSDP2 shards the model: what a layer writes at launch, in forward, would be lost after it."""
        from torch.distributed.fsdp import FSDPModule

        if any(isinstance(module, FSDPModule) for module in self._model.modules()):
            raise ValueError(
                "the model is sharded (fully_shard), and its layers launch themselves in forward (semantics='authors'), where "
                "nothing that they write stays; take semantics='loradash', whose DashSchedule launches between steps"
            )

    def claim(self) -> int:
        raise ValueError(
            "the layers count their own forward calls and launch themselves (semantics='authors'); DashSchedule is for "
            "semantics='loradash'"
        )


def attach(model: nn.Module, layers: Mapping[str, AuthorsLayer], step: int | None = None) -> None:
    """Leaves on the model the state of a run with these layers, which are of one semantics."""
    semantics = one_of({name: layer.semantics for name, layer in layers.items()}, "semantics", "a model has one")
    first = max(layer.FLAG for layer in layers.values()) if step is None else step
    state = CountedState(model, layers) if semantics == "authors" else ScheduledState(model, layers, first)
    for i, layer in enumerate(layers.values()):
        layer.run = state
        # One layer speaks for all.
        layer.reminded = i > 0
    setattr(model, STATE, state)


def settings_of_run(model: nn.Module, layers: Mapping[str, AuthorsLayer]) -> DashConfig:
    """The settings of a model with these layers, as it trains now."""
    return run_config(
        {name: layer.settings() for name, layer in layers.items()}, trained_modules(model, hosts_of(model))
    )


def hosts_of(model: nn.Module) -> list[nn.Module]:
    """The modules of a model that compute by an `AuthorsLayer`."""
    return [module for module in model.modules() if isinstance(module, AuthorsLayer | SdgHost)]


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
