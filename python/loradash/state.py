"""What `apply_dash` leaves on a model, and how it is found again, whatever the model was wrapped in since.

Models that another framework adapted (PEFT) are found too: they tell of their adapters by a `Host`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

from torch import Tensor, nn

from loradash_kernels import Directions

from .config import DashConfig
from .experts import ExpertParameter, expert_parameters
from .linear import DashLinear
from .parked import DEFAULT, PARTS, Parked

STATE = "_loradash_state"
"""The attribute of the adapted model that holds the `DashState` of its active adapter."""

WAITING = "_loradash_waiting"
"""The attribute of a model with several adapters that holds the states of the others, by name."""

HOST = "_loradash_host"
"""An attribute of the class of layers that another framework made: a function of the model that gives its `Host`."""

VIEW = "_loradash_view"
"""The attribute of a layer, of another framework's class, that holds the `DashLinear` which computes it."""

_WRAPPERS = re.compile(r"(^|\.)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)(?=\.|$)")


@dataclass
class DashState:
    """What a run must remember besides tensors; travels with the model and in the adapter file.

    Attributes:
        step: optimizer steps taken.
        dash_only: are A and B frozen?
        schedules: how many were made for this model; the last one counts.
        trained_before: names of the parameters that trained before the model was adapted.
        name: the adapter's.
    """

    config: DashConfig
    step: int = 0
    dash_only: bool = False
    schedules: int = 0
    trained_before: frozenset[str] = frozenset()
    name: str = DEFAULT

    def claim(self) -> int:
        """The number of a new schedule."""
        self.schedules += 1
        return self.schedules


class AdaptedLayer(Protocol):
    """A linear layer (N, K) with one LoRA-Dash adapter: a `DashLinear`, or a view of a layer that another framework made.

    An experts' parameter is one layer (E, N, K): all tensors but `launched` have a leading dimension of E, and
    `experts.matrices` gives its experts' as layers of their own. Equal and of one hash where layer and adapter are the same.

    Attributes:
        name: the layer's name in the model.
        config: the settings of this layer.
        lora_a (r, K), lora_b (N, r), dash_sigma (s): parameters. dash_u (N, s), dash_vt (s, K), launched (bool): buffers.
        weight: as the layer stores it. base: the layer that multiplies with it in a way of its own; None where `oriented`
            makes (N, K) of it.
        merged: is the update in the weight?
    """

    name: str

    @property
    def config(self) -> DashConfig: ...
    @property
    def lora_a(self) -> Tensor: ...
    @property
    def lora_b(self) -> Tensor: ...
    @property
    def dash_sigma(self) -> Tensor: ...
    @property
    def dash_u(self) -> Tensor: ...
    @property
    def dash_vt(self) -> Tensor: ...
    @property
    def launched(self) -> Tensor: ...
    @property
    def scaling(self) -> float: ...
    @property
    def in_features(self) -> int: ...
    @property
    def out_features(self) -> int: ...
    @property
    def weight(self) -> Tensor: ...
    @property
    def base(self) -> nn.Module | None: ...
    @property
    def merged(self) -> bool: ...
    def weight_nk(self) -> Tensor:
        """W (N, K): a view, or a new tensor with every call."""
        ...

    def oriented(self, weight: Tensor) -> Tensor:
        """A tensor of the stored weight's shape as (N, K)."""
        ...

    def launch(self, directions: Directions) -> None:
        """Takes u (N, s) and vt (s, K), and starts Δσ at zero; ValueError, and no change, where that cannot be."""
        ...


class Host(Protocol):
    """A model that another framework adapted, seen through its active adapter. ValueError where there is not exactly one."""

    def root(self) -> nn.Module:
        """The model in which the layers have their names."""
        ...

    def layers(self) -> dict[str, AdaptedLayer]:
        """The layers that have the adapter, by plain name."""
        ...

    def state(self) -> DashState:
        """The adapter's own, the same object with every call."""
        ...

    def export_lora(self, folder: Path) -> None:
        """Writes the adapter as `loradash.export_lora` promises."""
        ...


def host_of(model: nn.Module) -> Host | None:
    """How another framework tells of its adapters; None for a model of `apply_dash`, and for one without adapters."""
    return _find(model)[1]


def _find(model: nn.Module) -> tuple[nn.Module | None, Host | None]:
    """The part of a model that `apply_dash` adapted, or the host of what another framework did. Raises ValueError where there
    are several."""
    found, foreign = [], None
    for _, module in modules_outside(model):
        if STATE in module.__dict__:
            found.append(module)
        elif foreign is None:
            foreign = getattr(type(module), HOST, None)
    if len(found) + (foreign is not None) > 1:
        kinds = ", ".join([type(module).__name__ for module in found] + ["PEFT's layers"] * (foreign is not None))
        raise ValueError(f"several parts of the model were adapted apart ({kinds}); pass one of them")
    return (found[0] if found else None), (foreign(model) if foreign is not None else None)


def modules_outside(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """As `named_modules`, without the many parts of layers that another framework made: schedules walk after every step."""
    seen: set[int] = set()
    waiting = [("", model)]
    while waiting:
        name, module = waiting.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        yield name, module
        if not hasattr(type(module), HOST):
            children = [(f"{name}.{key}" if name else key, m) for key, m in module._modules.items() if m is not None]
            waiting.extend(reversed(children))


def unwrap(model: nn.Module) -> nn.Module:
    """The module that `apply_dash` was called on, wherever it sits in `model` (inside DistributedDataParallel, an engine,
    torch.compile, a larger model), or that PEFT took; `model` itself where there is none. Raises ValueError where there are
    several."""
    found, host = _find(model)
    return host.root() if host is not None else found if found is not None else model


def dash_state(model: nn.Module) -> DashState:
    """The state that `apply_dash` left on a model, or that of a PEFT model's active adapter. Raises ValueError where there
    is none."""
    found, host = _find(model)
    if host is not None:
        return host.state()
    if found is None and _own(model):
        raise ValueError(
            "the model's layers were adapted one by one, and nothing counts its steps: apply_dash(model, config) adapts a whole "
            "model; where the layers are loradash.integrations.subspace_tuning's, call mark_only_lora_as_trainable(model) first"
        )
    if found is None:
        raise ValueError(_no_adapters(model))
    return found.__dict__[STATE]


def _no_adapters(model: nn.Module) -> str:
    for name, module in model.named_modules():
        if is_adapted_by_peft(module):
            return (
                f"the model has adapters of PEFT that are not LoRA-Dash ({name}): make it by get_peft_model(model, "
                "DashLoraConfig(...)), or from a trained LoRA by from_lora(model, folder), both with loradash.integrations.peft"
            )
    return "the model has no LoRA-Dash adapters; call apply_dash(model, config) first"


def is_adapted_by_peft(module: nn.Module) -> bool:
    """Is it a layer that PEFT put around another one?"""
    return hasattr(module, "base_layer") and any(cls.__module__.startswith("peft.") for cls in type(module).__mro__)


def plain_name(name: str) -> str:
    """A module's name without the names that torch.compile, FSDP and activation checkpointing put into it."""
    return _WRAPPERS.sub("", name).lstrip(".")


def dash_layers(model: nn.Module) -> dict[str, AdaptedLayer]:
    """All adapted layers by plain name; a layer that occurs twice, under its first name. Those of a PEFT model are views of
    its active adapter."""
    found, host = _find(model)
    return host.layers() if host is not None else {**_own(model if found is None else found)}


def state_and_layers(model: nn.Module) -> tuple[DashState | None, dict[str, AdaptedLayer]]:
    """`dash_state`, or None where there is none, and `dash_layers`, for one search of the model."""
    found, host = _find(model)
    if host is not None:
        return host.state(), host.layers()
    return (None, {**_own(model)}) if found is None else (found.__dict__[STATE], {**_own(found)})


def parameter_of(tensor: Tensor) -> Tensor:
    """The parameter that a part of an adapted layer is, or is a view of: what an optimizer has."""
    return tensor if tensor._base is None else tensor._base


OwnLayer = DashLinear | ExpertParameter


def own_layers(model: nn.Module, instead: str = "its own functions") -> dict[str, OwnLayer]:
    """The layers, experts' parameters among them, that `apply_dash` made. Raises TypeError for a PEFT model, which has a call of its own: `instead`."""
    if host_of(model) is not None:
        raise TypeError(f"the adapters of this model are PEFT's; call {instead}")
    return _own(unwrap(model))


def _own(root: nn.Module) -> dict[str, OwnLayer]:
    layers = _all_own(root).items()
    return {name: m for name, m in layers if not isinstance(m, DashLinear) or m.adapter is not None}


def _all_own(root: nn.Module) -> dict[str, OwnLayer]:
    found: dict[str, OwnLayer] = {}
    for name, m in root.named_modules():
        layer = m.__dict__.get(VIEW, m)
        if isinstance(layer, DashLinear):
            found[plain_name(name)] = layer
        else:
            found |= {plain_name(f"{name}.{whole.parameter}"): whole for whole in expert_parameters(layer)}
    return found


def linears_of(layers: Mapping[str, OwnLayer]) -> dict[str, DashLinear]:
    """The linear layers among adapted ones."""
    return {name: layer for name, layer in layers.items() if isinstance(layer, DashLinear)}


def experts_of(layers: Mapping[str, OwnLayer]) -> dict[str, ExpertParameter]:
    """The experts' parameters among adapted layers."""
    return {name: layer for name, layer in layers.items() if isinstance(layer, ExpertParameter)}


def all_layers(model: nn.Module, instead: str = "its own functions") -> dict[str, OwnLayer]:
    """`own_layers`, and those of which only other adapters than the active one are part."""
    own_layers(model, instead)
    return _all_own(unwrap(model))


def states(model: nn.Module) -> dict[str, DashState]:
    """The states of all adapters of a model of `apply_dash`, by name, the active one's first. ValueError where there is none."""
    active = dash_state(model)
    return {active.name: active, **unwrap(model).__dict__.get(WAITING, {})}


class OneAdapter:
    """A layer of ours with the adapter that was active when this was made, whichever is later: an `AdaptedLayer`."""

    def __init__(self, layer: DashLinear, adapter: str) -> None:
        self.layer, self.adapter = layer, adapter

    def __getattr__(self, name: str) -> Any:
        # A copy is asked before it has any attribute.
        if name in ("layer", "adapter") or name.startswith("__"):
            raise AttributeError(name)
        return self.layer.part(self.adapter, name) if name in PARTS else getattr(self.layer, name)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, OneAdapter) and (other.layer is self.layer and other.adapter == self.adapter)

    def __hash__(self) -> int:
        return hash((id(self.layer), self.adapter))


def training_parked(model: nn.Module, adapter: str) -> dict[str, AdaptedLayer]:
    """The layers of an adapter that is not active and trains all the same, in mixed batches, each as that one; else none."""
    layers = linears_of(_all_own(unwrap(model)))
    return {
        name: cast(AdaptedLayer, OneAdapter(layer, adapter))
        for name, layer in layers.items()
        if any(
            n == adapter and any(p.requires_grad for p in parked.parameters()) for n, parked in layer.parked_adapters()
        )
    }


def parked_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The parameters of all adapters of ours that are not active, each with its name in PARTS."""
    for module in unwrap(model).modules():
        if isinstance(module, Parked):
            yield from module.named_parameters(recurse=False)
