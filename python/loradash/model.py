"""Puts adapters into a model, takes them in and out of its weights, and counts what trains."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from .attention import call_adapted_layers
from .base_layers import is_linear
from .bypass import bypassed_children, child_at, refuse_fusing
from .config import DashConfig
from .distributed import reshard
from .linear import DashLinear
from .quantised import RequantisationError
from .state import (
    STATE,
    DashState,
    dash_layers,
    dash_state,
    is_adapted_by_peft,
    own_layers,
    parameter_of,
    plain_name,
    unwrap,
)
from .targets import check_patterns, target_layers, trainable_modules
from .units import Units, is_fsdp2


def apply_dash(model: nn.Module, config: DashConfig | None = None) -> nn.Module:
    """Replaces linear layers by `DashLinear` around them, in place, and freezes everything else.

    nn.Linear and transformers' Conv1D give up their weight and bias; subclasses, quantised, hooked and offloaded layers
    are kept whole (docs/layers.md has the table). A module that occurs twice becomes one adapted layer; a weight tied to
    another module's stays tied. Modules in `config.trainable_modules` keep training as they are.

    Returns the model. Raises ValueError, with the model unchanged: nothing matches, or a setting does not; adapted or
    wrapped (DistributedDataParallel, fully_shard, FSDP1) already; a layer that cannot be adapted, or that its parent passes by.
    """
    config = config or DashConfig()
    given = model
    # torch.compile traces the changed module anew.
    model = model._modules.get("_orig_mod") or model
    _check_model(model)
    check_patterns(model, config)
    chosen = target_layers(model, config)
    _check_parents(model, chosen, config)
    adapted = {module: _around(name, module, config) for name, module in chosen.items()}
    trained = _trained_parameters(model, config)
    _check_ties(adapted.values(), trained)
    parameters = model.named_parameters(remove_duplicate=False)
    trained_before = frozenset(plain_name(name) for name, p in parameters if p.requires_grad)

    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for layer in adapted.values():
        layer.freeze_base()
    for parent in list(model.modules()):
        # named_children would skip a module's second name.
        for child, module in parent._modules.items():
            if module in adapted:
                parent._modules[child] = adapted[module]
    for parent in list(model.modules()):
        if any(isinstance(module, DashLinear) for module in parent.modules()):
            call_adapted_layers(parent)
            refuse_fusing(parent)
    for parameter in trained:
        parameter.requires_grad_(True)
    setattr(model, STATE, DashState(config, trained_before=trained_before))
    return given


def _check_model(model: nn.Module) -> None:
    if is_linear(model) or isinstance(model, DashLinear):
        raise ValueError(
            f"the model is itself one layer, {type(model).__name__}; adapt it by DashLinear.from_linear(layer, config)"
        )
    for name, module in model.named_modules():
        if isinstance(module, DashLinear) or STATE in module.__dict__:
            raise ValueError(f"the model has LoRA-Dash adapters already{f', in {name}' if name else ''}")
        if is_adapted_by_peft(module):
            raise ValueError(f"{name} has an adapter of PEFT; merge_and_unload it first")
        if wrapper := wrapper_of(module):
            raise ValueError(f"{name or 'the model'} is wrapped in {wrapper}; apply_dash comes before it")


def wrapper_of(module: nn.Module) -> str | None:
    """The name of what has taken note of a module's parameters, so that gradients of adapters that come later would never be
    reduced over processes; None where there is nothing."""
    found: list[type] = [nn.parallel.DistributedDataParallel, nn.DataParallel]
    if torch.distributed.is_available():
        from torch.distributed import fsdp

        found += [fsdp.FullyShardedDataParallel, fsdp.FSDPModule]
    if isinstance(module, tuple(found)):
        sharded = is_fsdp2(module)
        return f"fully_shard ({type(module).__name__})" if sharded else type(module).__name__
    composed = sys.modules.get("torch.distributed._composable.contract")
    applied = None if composed is None else composed._get_registry(module)
    return "replicate" if applied and "replicate" in applied else None


def _check_parents(model: nn.Module, chosen: dict[str, nn.Module], config: DashConfig) -> None:
    """Refuses (or with config.bypassed="warn" tells) where a parent's own code multiplies by a chosen child's weight."""
    places = {
        child_at(parent, child): place
        for parent in model.modules()
        for child, place in bypassed_children(parent).items()
    }
    found = {name: places[module] for name, module in chosen.items() if module in places}
    if not found:
        return
    shown = ", ".join(f"{name} (in {place})" for name, place in list(found.items())[:4])
    leave_out = sorted({name.rpartition(".")[2] for name in found})
    text = (
        f"{len(found)} layers whose parent multiplies by their weight itself, so that an adapter would be passed by: "
        f"{shown}{', ...' if len(found) > 4 else ''}. Leave them out by exclude_modules={leave_out}"
    )
    if config.bypassed == "refuse":
        raise ValueError(f'{text}, or where that code never runs, set bypassed="warn"')
    warnings.warn(f"loradash: {text}", stacklevel=3)


def _around(name: str, module: nn.Module, config: DashConfig) -> DashLinear:
    try:
        layer = DashLinear.around(module, config.for_module(name))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: {error}") from error
    layer.name = name
    return layer


def _trained_parameters(model: nn.Module, config: DashConfig) -> list[nn.Parameter]:
    """Parameters of the modules that train as a whole. Raises ValueError for one that cannot."""
    found = []
    for name, module in trainable_modules(model, config).items():
        for key, parameter in module.named_parameters():
            if not parameter.is_floating_point():
                raise ValueError(f"trainable_modules: {name}.{key} is {parameter.dtype} and cannot train")
            found.append(parameter)
    return found


def _check_ties(adapted: Iterable[DashLinear], trained: list[nn.Parameter]) -> None:
    """An adapted layer's own weight is frozen: it cannot be one that trains elsewhere."""
    training = {id(p) for p in trained}
    tied = [layer.name for layer in adapted if id(layer.weight) in training]
    if tied:
        raise ValueError(
            f"trainable_modules: the weight of {', '.join(tied[:4])} is tied to one of theirs and would have to train; leave "
            "out either"
        )


def merge(model: nn.Module, requantise: bool = False) -> dict[str, RequantisationError]:
    """Adds every layer's ΔW to its weight, for inference without adapters. All layers or, where one cannot, none.

    Every process must call this for a model sharded by FSDP2 or FSDP1. Raises ValueError, naming the layer (`DashLinear.merge`).

    Args:
        requantise: quantised layers are quantised anew with their update, instead of refused.

    Returns the error that this made, for every layer that was quantised anew.
    """
    reshard(model)
    return merge_layers(model, own_layers(model, "model.merge_adapter()"), requantise)


def merge_layers(
    model: nn.Module, layers: Mapping[str, DashLinear], requantise: bool
) -> dict[str, RequantisationError]:
    """`merge` for some layers of a model."""
    units = Units(model)
    done: list[DashLinear] = []
    errors: dict[str, RequantisationError] = {}
    try:
        for name, layer in layers.items():
            if not layer.merged:
                part = layer.weight.detach().clone() if units.has(layer) else None
                with units.whole(layer, write=True):
                    error = layer.merge(requantise, part)
                done.append(layer)
                errors |= {} if error is None else {name: error}
    except BaseException:
        for layer in done:
            layer.unmerge()
        raise
    return errors


def unmerge(model: nn.Module) -> None:
    """Undoes `merge`, bit for bit."""
    reshard(model)
    for layer in own_layers(model, "model.unmerge_adapter()").values():
        layer.unmerge()


@contextlib.contextmanager
def disable(model: nn.Module) -> Iterator[nn.Module]:
    """Within the block the model is the frozen base model. Merged layers are unmerged for its length."""
    layers = own_layers(model, "model.disable_adapter()")
    enabled = {name: layer.enabled for name, layer in layers.items()}
    merged = {name: layer for name, layer in layers.items() if layer.merged}
    for layer in layers.values():
        layer.unmerge()
        layer.enabled = False
    try:
        yield model
    finally:
        for name, layer in layers.items():
            layer.enabled = enabled[name]
        merge_layers(model, merged, requantise=True)


def dash_only(model: nn.Module) -> None:
    """From now on only Δσ trains: A and B are frozen. Raises ValueError before launch."""
    layers = own_layers(model, "requires_grad_(False) on its lora_A and lora_B")
    waiting = [name for name, layer in layers.items() if not bool(layer.launched)]
    if waiting:
        raise ValueError(f"dash_only comes after launch; still in pre-launch: {', '.join(waiting[:4])}")
    train_sigma_alone(model, True)


def train_sigma_alone(model: nn.Module, alone: bool) -> None:
    """Freezes A and B, or has them train again, whatever the phase: a resumed run learns of that by its own ways."""
    for layer in dash_layers(model).values():
        layer.lora_a.requires_grad_(not alone)
        layer.lora_b.requires_grad_(not alone)
    dash_state(model).dash_only = alone


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
    parameters = list(unwrap(model).parameters())
    adapters = sum(p.numel() for p in parameters if id(p) in ours and p.requires_grad)
    other = sum(p.numel() for p in parameters if id(p) not in ours and p.requires_grad)
    return Summary(len(layers), adapters, other, sum(p.numel() for p in parameters))
