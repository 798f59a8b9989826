"""Puts adapters into a model, and takes them in and out of its weights."""

from __future__ import annotations

import contextlib
import math
import numbers
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from . import data_parallel, zero
from .attention import call_adapted_layers
from .base_layers import CONVOLUTIONS, is_linear
from .bypass import bypassed_children, child_at, refuse_fusing
from .config import DashConfig
from .convolution import DashConvolution
from .distributed import reshard
from .expert_modules import stacked_names
from .experts import DashExperts, ExpertParameter
from .linear import DashLinear
from .parked import DEFAULT
from .quantised import RequantisationError
from .slices import LinearSlice
from .state import (
    STATE,
    DashState,
    OwnLayer,
    all_layers,
    dash_layers,
    dash_state,
    experts_of,
    is_adapted_by_peft,
    own_layers,
    plain_name,
    states,
    unwrap,
)
from .targets import check_patterns, target_layers, target_parameters, trainable_modules
from .units import Units, is_fsdp2

BASE_ALONE = "base"
"""In a mixed batch: this row gets the base model's output."""


def apply_dash(model: nn.Module, config: DashConfig | None = None, adapter: str = DEFAULT) -> nn.Module:
    """Replaces linear layers by `DashLinear` around them, in place, and freezes everything else. Experts' parameters that
    `config.target_parameters` names get adapters beside them (docs/experts.md).

    nn.Linear and transformers' Conv1D give up their weight and bias; subclasses, quantised, hooked and offloaded layers
    are kept whole (docs/layers.md has the table). A module that occurs twice becomes one adapted layer; a weight tied to
    another module's stays tied. Modules in `config.trainable_modules` keep training as they are.

    Args:
        adapter: the name of this adapter, beside others of `add_adapter`.

    Returns the model. Raises ValueError, with the model unchanged: nothing matches, or a setting does not; adapted or
    wrapped (DistributedDataParallel, fully_shard, FSDP1) already; a layer that cannot be adapted, or that its parent passes by.
    Warns where every linear layer is adapted and experts are left out, unless target_parameters=[] says so.
    """
    config = config or DashConfig()
    given = put_adapters(model, config, adapter)
    left_out = next(stacked_names(unwrap(model)), None)
    if left_out is not None and config.target_modules is None and config.target_parameters is None:
        warnings.warn(
            f"loradash: every linear layer is adapted, and the experts of this model are parameters ({plain_name(left_out)}) that "
            "stay as they are: target_parameters adapts them, and target_parameters=[] says that they are left out",
            stacklevel=2,
        )
    return given


def put_adapters(model: nn.Module, config: DashConfig, adapter: str) -> nn.Module:
    """`apply_dash`, whatever is left out."""
    given = model
    # torch.compile traces the changed module anew.
    model = model._modules.get("_orig_mod") or model
    check_adapter_name(adapter)
    _check_model(model)
    check_patterns(model, config)
    adapted = adapted_layers(model, target_layers(model, config), config, adapter)
    experts = [
        ExpertParameter(module, key, config.for_module(name), name)
        for name, (module, key) in target_parameters(model, config).items()
    ]
    trained = _trained_parameters(model, config)
    _check_ties([*adapted.values(), *experts], trained)
    parameters = model.named_parameters(remove_duplicate=False)
    trained_before = frozenset(plain_name(name) for name, p in parameters if p.requires_grad)

    for parameter in model.parameters():
        parameter.requires_grad_(False)
    put_in_place(model, adapted)
    for whole in experts:
        whole.install()
    for parameter in trained:
        parameter.requires_grad_(True)
    setattr(model, STATE, DashState(config, trained_before=trained_before, name=adapter))
    return given


def check_adapter_name(name: str) -> None:
    """Raises ValueError for what cannot be a part of a tensor's name, and for the name that stands for no adapter."""
    if not isinstance(name, str) or not name or "." in name or name == BASE_ALONE:
        raise ValueError(f"an adapter's name must be a string without dots, not empty nor {BASE_ALONE!r}, got {name!r}")


def adapted_layers(
    model: nn.Module, chosen: dict[str, nn.Module], config: DashConfig, adapter: str
) -> dict[nn.Module, DashLinear]:
    """For plain layers, given by name, those that take their place. Nothing is changed. Raises ValueError, naming the layer, for
    one that cannot be adapted or that its parent passes by."""
    _check_parents(model, chosen, config)
    return {module: _around(name, module, config, adapter) for name, module in chosen.items()}


def put_in_place(model: nn.Module, adapted: dict[nn.Module, DashLinear]) -> None:
    """Freezes adapted layers and puts each where its plain one was."""
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


def _check_model(model: nn.Module) -> None:
    if is_linear(model) or isinstance(model, (DashLinear, *CONVOLUTIONS)):
        way = "convolution.DashConvolution" if isinstance(model, CONVOLUTIONS) else "DashLinear"
        raise ValueError(
            f"the model is itself one layer, {type(model).__name__}; adapt it by loradash.{way}.from_linear(layer, config)"
        )
    for name, module in model.named_modules():
        if isinstance(module, DashLinear | DashExperts) or STATE in module.__dict__:
            where = f", in {name}" if name else ""
            raise ValueError(
                f"the model has LoRA-Dash adapters already{where}; add_adapter(model, name, config) adds one"
            )
        if is_adapted_by_peft(module):
            raise ValueError(f"{name} has an adapter of PEFT; merge_and_unload it first")
        if wrapper := wrapper_of(module):
            raise ValueError(f"{name or 'the model'} is wrapped in {wrapper}; apply_dash comes before it")
    if any(map(zero.is_trained_by_zero, model.parameters())):
        raise ValueError(
            "deepspeed.initialize has this model's parameters in its optimizer; apply_dash comes before it"
        )


def wrapper_of(module: nn.Module) -> str | None:
    """The name of what has taken note of a module's parameters, so that gradients of adapters that come later would never be
    reduced over processes; None where there is nothing."""
    found: list[type] = [nn.parallel.DistributedDataParallel, nn.DataParallel]
    if torch.distributed.is_available():
        from torch.distributed import fsdp

        found += [fsdp.FullyShardedDataParallel, fsdp.FSDPModule]
    found += zero.engines()
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


def _around(name: str, module: nn.Module, config: DashConfig, adapter: str) -> DashLinear:
    try:
        kind = DashConvolution if isinstance(module, CONVOLUTIONS) else DashLinear
        layer = kind.around(module, config.for_module(name))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: {error}") from error
    layer.name, layer.adapter = name, adapter
    return layer


def _trained_parameters(model: nn.Module, config: DashConfig) -> list[nn.Parameter]:
    """Parameters of the modules that train as a whole. Raises ValueError for one that cannot."""
    found = []
    for name, module in trainable_modules(model, config).items():
        if isinstance(module, LinearSlice):
            raise ValueError(
                f"trainable_modules: {name} is a part of a fused layer, which trains as a whole or not at all"
            )
        for key, parameter in module.named_parameters():
            if not parameter.is_floating_point():
                raise ValueError(f"trainable_modules: {name}.{key} is {parameter.dtype} and cannot train")
            found.append(parameter)
    return found


def _check_ties(adapted: Iterable[OwnLayer], trained: list[nn.Parameter]) -> None:
    """An adapted layer's own weight is frozen: it cannot be one that trains elsewhere."""
    training = {id(p) for p in trained}
    tied = [layer.name for layer in adapted if id(layer.weight) in training]
    if tied:
        raise ValueError(
            f"trainable_modules: the weight of {', '.join(tied[:4])} is tied to one of theirs and would have to train; leave "
            "out either"
        )


def merge(
    model: nn.Module, requantise: bool = False, adapters: Mapping[str, float] | None = None
) -> dict[str, RequantisationError]:
    """Adds every layer's ΔW to its weight, for inference without adapters. All layers or, where one cannot, none.

    Every process must call this for a model sharded by FSDP2 or FSDP1. Raises ValueError, naming the layer (`DashLinear.merge`).

    Args:
        requantise: quantised layers are quantised anew with their update, instead of refused.
        adapters: name -> factor; the weights get the sum of factor · ΔW over these, instead of the active adapter's ΔW.

    Returns the error that this made, for every layer that was quantised anew.
    """
    layers = own_layers(model, "model.merge_adapter()")
    if adapters is not None:
        adapters = check_factors(model, adapters)
        layers = all_layers(model)
        if experts_of(layers):
            raise ValueError("adapters: experts' parameters have one adapter, which merge(model) takes")
    other = [n for n, layer in layers.items() if layer.merged and _factors(layer) != adapters]
    if other:
        raise ValueError(f"unmerge(model) first; with other adapters or factors are merged: {', '.join(other[:4])}")
    reshard(model)
    return merge_layers(model, layers, requantise, adapters)


def merge_layers(
    model: nn.Module, layers: Mapping[str, OwnLayer], requantise: bool, adapters: Mapping[str, float] | None
) -> dict[str, RequantisationError]:
    """`merge` for some layers of a model."""
    units = Units(model)
    done: list[OwnLayer] = []
    errors: dict[str, RequantisationError] = {}
    try:
        for name, layer in layers.items():
            if not layer.merged:
                part = layer.weight.detach().clone() if units.has(layer) else None
                with units.whole(layer, write=True):
                    error = _merge(layer, requantise, part, adapters)
                done.append(layer)
                errors |= {} if error is None else {name: error}
    except BaseException:
        for layer in done:
            layer.unmerge()
        raise
    return errors


def check_factors(model: nn.Module, adapters: Mapping[str, float]) -> dict[str, float]:
    """Names of adapters with their factors, checked. ValueError for what is no finite number or no adapter of the model."""
    known, found = states(model), dict[str, float]()
    for name, factor in adapters.items():
        if name not in known:
            raise ValueError(f"the model has no adapter {name!r}; it has {', '.join(known)}")
        if isinstance(factor, bool) or not isinstance(factor, numbers.Real) or not math.isfinite(factor):
            raise ValueError(f"the factor of {name!r} must be a finite number, got {factor!r}")
        found[name] = float(factor)
    if not found:
        raise ValueError("adapters names none; wanted a dict of name -> factor")
    return found


def unmerge(model: nn.Module) -> None:
    """Undoes `merge`, bit for bit."""
    reshard(model)
    for layer in all_layers(model, "model.unmerge_adapter()").values():
        layer.unmerge()


@contextlib.contextmanager
def disable(model: nn.Module) -> Iterator[nn.Module]:
    """Within the block the model is the frozen base model. Merged layers are unmerged for its length."""
    layers = all_layers(model, "model.disable_adapter()")
    enabled = {name: layer.enabled for name, layer in layers.items()}
    merged = {name: layer for name, layer in layers.items() if layer.merged}
    factors = merged_factors(layers)
    for layer in layers.values():
        layer.unmerge()
        layer.enabled = False
    try:
        yield model
    finally:
        for name, layer in layers.items():
            layer.enabled = enabled[name]
        merge_layers(model, merged, True, factors)


def _merge(
    layer: OwnLayer, requantise: bool, part: Tensor | None, adapters: Mapping[str, float] | None
) -> RequantisationError | None:
    if isinstance(layer, DashLinear):
        return layer.merge(requantise, part, adapters)
    return layer.merge(requantise, part)


def _factors(layer: OwnLayer) -> Mapping[str, float] | None:
    return layer._weights if isinstance(layer, DashLinear) else None


def merged_factors(layers: Mapping[str, OwnLayer]) -> Mapping[str, float] | None:
    """What of which adapters is in the weights of merged layers; None for the active one, once."""
    return next((_factors(layer) for layer in layers.values() if layer.merged), None)


def dash_only(model: nn.Module) -> None:
    """From now on only Δσ trains: A and B are frozen. Raises ValueError before launch, and where DeepSpeed's ZeRO or
    DistributedDataParallel has them as parameters that train."""
    layers = own_layers(model, "requires_grad_(False) on its lora_A and lora_B")
    waiting = [name for name, layer in layers.items() if not bool(layer.launched)]
    if waiting:
        raise ValueError(f"dash_only comes after launch; still in pre-launch: {', '.join(waiting[:4])}")
    train_sigma_alone(model, True)


def train_sigma_alone(model: nn.Module, alone: bool) -> None:
    """Freezes A and B, or has them train again, whatever the phase: a resumed run learns of that by its own ways.

    Raises ValueError, with nothing changed, once deepspeed.initialize has put them together with others, and
    inside a DistributedDataParallel that was made while they were not as now.
    """
    refuse_refreezing(model, alone)
    for layer in dash_layers(model).values():
        layer.lora_a.requires_grad_(not alone)
        layer.lora_b.requires_grad_(not alone)
    dash_state(model).dash_only = alone


def refuse_refreezing(model: nn.Module, alone: bool) -> None:
    """ZeRO steps on whatever deepspeed.initialize gave it: frozen later, A and B would go on by their momentum. DDP averages
    what trained when it was made."""
    if alone == dash_state(model).dash_only:
        return
    adapters = [p for layer in dash_layers(model).values() for p in (layer.lora_a, layer.lora_b)]
    if any(map(zero.is_trained_by_zero, adapters)):
        raise ValueError(
            "DeepSpeed's optimizer has the adapters as they trained when it was made: freeze or thaw A and B (dash_only, or "
            "load_adapter of such a file) before deepspeed.initialize"
        )
    data_parallel.refuse_refreezing(unwrap(model), adapters, freeze=alone)
