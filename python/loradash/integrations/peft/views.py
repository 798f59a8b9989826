"""PEFT's layers as loradash's schedule, pre-launch and export see them: one adapter at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn

from loradash.base_layers import computes_plainly, has_plain_code, is_transposed
from loradash.config import DashConfig
from loradash.distributed import is_sharded
from loradash.linear import take_directions
from loradash.quantised import weight_of
from loradash.state import AdaptedLayer, DashState, modules_outside, plain_name
from loradash_kernels import Directions

from .config import DashLoraConfig
from .files import export_lora

STATES = "_loradash_adapters"
"""The attribute of the base model that holds the `AdapterState` of each adapter."""


class LayerView:
    """A layer (N, K) of PEFT's with one of its adapters, as an `AdaptedLayer`."""

    def __init__(self, layer: Any, adapter: str, name: str, settings: DashLoraConfig) -> None:
        self.layer, self.adapter, self.name, self._settings = layer, adapter, name, settings

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LayerView) and self.layer is other.layer and self.adapter == other.adapter

    def __hash__(self) -> int:
        return hash((id(self.layer), self.adapter))

    def __repr__(self) -> str:
        return f"LayerView({self.name!r}, adapter={self.adapter!r})"

    @property
    def config(self) -> DashConfig:
        return self._settings.dash_config(self.layer.r[self.adapter], self.layer.lora_alpha[self.adapter])

    @property
    def lora_a(self) -> Tensor:
        return self.layer.lora_A[self.adapter].weight

    @property
    def lora_b(self) -> Tensor:
        return self.layer.lora_B[self.adapter].weight

    @property
    def dash_sigma(self) -> Tensor:
        return self.layer.lora_dash_sigma[self.adapter]

    @property
    def dash_u(self) -> Tensor:
        return self.layer.lora_dash_u[self.adapter]

    @property
    def dash_vt(self) -> Tensor:
        return self.layer.lora_dash_vt[self.adapter]

    @property
    def launched(self) -> Tensor:
        return self.layer.lora_dash_launched[self.adapter]

    @property
    def scaling(self) -> float:
        return float(self.layer.scaling[self.adapter])

    @property
    def in_features(self) -> int:
        return self.layer.in_features

    @property
    def out_features(self) -> int:
        return self.layer.out_features

    @property
    def weight(self) -> Tensor:
        return self.layer.weight

    @property
    def base(self) -> nn.Module | None:
        base = self.layer.get_base_layer()
        # Its weight is gathered before anybody multiplies with it.
        sharded = is_sharded(base.weight) and has_plain_code(base)
        return None if sharded or computes_plainly(base) else base

    @property
    def merged(self) -> bool:
        return self.layer.merged

    def weight_nk(self) -> Tensor:
        return weight_of(self.layer.get_base_layer())

    def oriented(self, weight: Tensor) -> Tensor:
        return weight.t() if is_transposed(self.layer.get_base_layer()) else weight

    def launch(self, directions: Directions) -> None:
        take_directions(self, directions)


class AdapterState(DashState):
    """The state of one adapter. Its step lies in the adapter's tensors, so that whatever carries these carries it."""

    def __init__(self, root: nn.Module, adapter: str, settings: DashLoraConfig) -> None:
        self._root, self.adapter, self.settings = root, adapter, settings
        self.dash_only, self.schedules = False, 0
        self._layers: list[Any] = []
        self._seen: list[tuple[Tensor, float]] = []
        self._step = 0

    @property
    def config(self) -> DashConfig:  # type: ignore[override]
        return self.settings.dash_config()

    @property
    def step(self) -> int:
        # The tensors are read only after somebody else wrote them: on a GPU that waits for all that was queued.
        buffers = self._buffers()
        if len(buffers) != len(self._seen) or any(
            b is not seen or _version(b) != version for b, (seen, version) in zip(buffers, self._seen, strict=True)
        ):
            steps = {int(b) for b in buffers}
            if len(steps) > 1:
                raise ValueError(
                    f"the layers of adapter {self.adapter} disagree about its step ({sorted(steps)}): they were loaded from "
                    "several checkpoints; load one of them whole"
                )
            self._step = steps.pop() if steps else 0
            self._note(buffers)
        return self._step

    @step.setter
    def step(self, value: int) -> None:
        buffers = self._buffers()
        if not buffers:
            raise RuntimeError(
                f"adapter {self.adapter} was taken out of the model: its steps cannot be counted any more"
            )
        with torch.no_grad():
            torch._foreach_zero_(buffers)
            torch._foreach_add_(buffers, value)
        self._step = value
        self._note(buffers)

    def _note(self, buffers: list[Tensor]) -> None:
        self._seen = [(b, _version(b)) for b in buffers]

    def _buffers(self) -> list[Tensor]:
        if not self._layers or not all(_has(layer, self.adapter) for layer in self._layers):
            self._layers = [layer for _, layer in layers_with(self._root, self.adapter)]
        return [layer._modules["lora_dash_step"]._buffers[self.adapter] for layer in self._layers]


def _version(tensor: Tensor) -> float:
    """What changes with every write; unlike itself for tensors made under inference_mode, which count none."""
    return math.nan if tensor.is_inference() else tensor._version


class PeftHost:
    """A model of PEFT's, seen through its active adapter: a `loradash.state.Host`."""

    def __init__(self, root: nn.Module, adapter: str, layers: list[tuple[str, Any]]) -> None:
        self._root, self.adapter, self._layers = root, adapter, [found for found in layers if _has(found[1], adapter)]
        self.settings: DashLoraConfig = root.__dict__["peft_config"][adapter]

    def root(self) -> nn.Module:
        return self._root

    def layers(self) -> dict[str, AdaptedLayer]:
        found: dict[str, AdaptedLayer] = {}
        for name, layer in self._layers:
            found[name] = LayerView(layer, self.adapter, name, self.settings)
        return found

    def state(self) -> AdapterState:
        states: dict[str, AdapterState] = self._root.__dict__.setdefault(STATES, {})
        known = states.get(self.adapter)
        # An adapter that was deleted and made again under the same name starts anew.
        if known is None or known.settings is not self.settings:
            known = states[self.adapter] = AdapterState(self._root, self.adapter, self.settings)
        return known

    def export_lora(self, folder: Path) -> None:
        export_lora(self._root, self.adapter, dict(self._layers), folder)


def host_of(model: nn.Module) -> PeftHost:
    """What `loradash.state` asks of a model with layers of this package.

    Raises ValueError where it is a part of what PEFT adapted, and where not exactly one adapter is active.
    """
    # Asked after every step of training: each walk over the model counts.
    candidates = [m for _, m in modules_outside(model) if "peft_config" in m.__dict__ and not isinstance(m, BaseTuner)]
    roots = [(m, layers) for m in candidates if (layers := list(dash_layers_of(m)))]
    if len(roots) != 1:
        found = ", ".join(type(root).__name__ for root, _ in roots) or "none"
        raise ValueError(f"wanted a model that PEFT adapted once, as a whole; found in it: {found}")
    ((root, layers),) = roots
    names = list(dict.fromkeys(a for _, layer in layers for a in layer.active_adapters if _has(layer, a)))
    if len(names) != 1:
        raise ValueError(
            f"one LORADASH adapter at a time is trained, launched and exported; active: {', '.join(names) or 'none'}, present: "
            f"{', '.join(root.__dict__['peft_config'])}; model.set_adapter(name) first"
        )
    return PeftHost(root, names[0], layers)


def dash_layers_of(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """All layers of this package by plain name, whatever their adapters."""
    for name, module in modules_outside(model):
        if "lora_dash_sigma" in module._modules:
            yield plain_name(name), module


def layers_with(root: nn.Module, adapter: str) -> Iterator[tuple[str, Any]]:
    """The layers that have an adapter, by plain name."""
    return ((name, layer) for name, layer in dash_layers_of(root) if _has(layer, adapter))


def _has(layer: Any, adapter: str) -> bool:
    return adapter in layer._modules["lora_dash_step"]._buffers
