"""The merged model without adapters: plain layers, as if the model had been trained as a whole."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from torch import Tensor, nn

from .attention import compute_as_before
from .bypass import allow_fusing
from .distributed import is_sharded
from .experts import ExpertParameter
from .grouping import ungroup_projections
from .linear import DashLinear
from .model import wrapper_of
from .parked import PARTS, PLACE
from .slices import LinearSlice
from .split import SplitLinear, join_plain, move_hooks
from .state import STATE, WAITING, OwnLayer, all_layers, experts_of, linears_of, plain_name, unwrap
from .units import fsdp1_units, is_fsdp2

_OURS = {
    "base",
    "config",
    "name",
    "enabled",
    "adapter",
    "transposed",
    "adopted",
    "_unmerged",
    "_weights",
    "_mixed_rows",
    "group",
}
# Modules of their own kind have their own; a compiled call is the adapted layer's.
_OF_ANY_MODULE = {"_parameters", "_buffers", "_modules", "_compiled_call_impl"}


def merge_and_unload(model: nn.Module) -> nn.Module:
    """Adds every layer's ΔW to its weight and takes the adapters out, in place: a model of the classes it had before.

    Of several adapters the active one is merged, or what `merge(model, adapters=...)` merged before; the others are gone.

    Its outputs are those of `merge(model)`, its state dict has the keys of the model before `apply_dash`, and parameters
    train that trained then. Layers that gave up their weight come back as layers of their class, layers kept whole come back
    themselves, both with the hooks that were put on them since. Quantised layers are merged before, which tells the error
    that it makes: `errors = merge(model, requantise=True)`. There is no way back: the adapter is gone unless it was saved.

    Returns the model; for a model that is itself one `DashLinear`, the plain layer.

    Raises ValueError, with the model unchanged, naming the layer:
        a weight that cannot take ΔW (quantised, computed, on meta, or it would overflow);
        a weight tied to another module's, which cannot get the update: an embedding with the head's weight;
        parameters sharded by FSDP2 or parallelize_module, a model inside DistributedDataParallel, DataParallel or FSDP1;
        a layer whose `forward` was replaced since (accelerate's hooks).
    TypeError for a PEFT model, which has a merge_and_unload of its own.
    """
    layers = all_layers(model, "model.merge_and_unload()")
    if not layers:
        raise ValueError("the model has no LoRA-Dash adapters; there is nothing to merge")
    _check(model, layers)
    for whole in experts_of(layers).values():
        if _has_update(whole):
            whole.merge()
        whole.remove()
    ungroup_projections(model)
    plain: dict[nn.Module, nn.Module] = {}
    for layer in linears_of(layers).values():
        # Without an update the weight itself stays, and what is tied to it.
        if _has_update(layer):
            layer.merge()
        plain[layer] = _plain(layer)
    root = unwrap(model)
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child in plain:
                parent._modules[name] = plain[child]
        compute_as_before(parent)
        allow_fusing(parent)
    join_plain(model)
    state = root.__dict__.pop(STATE, None)
    root.__dict__.pop(WAITING, None)
    for name, parameter in root.named_parameters(remove_duplicate=False):
        if state is not None and plain_name(name) in state.trained_before:
            parameter.requires_grad_(True)
    return plain.get(model, model)


def _check(model: nn.Module, layers: Mapping[str, OwnLayer]) -> None:
    for module_name, module in model.named_modules():
        wrapper = wrapper_of(module)
        if wrapper and (is_fsdp2(module) or fsdp1_units(module)):
            raise ValueError(
                f"{module_name or 'the model'} is wrapped in {wrapper}, whose parts stay those of the adapted layers: "
                "save_adapter(model, path) in every process, then merge_and_unload(load_adapter(plain_model, path)); or "
                "merge(model) and use it as it is"
            )
        if wrapper:
            raise ValueError(f"{module_name or 'the model'} is wrapped in {wrapper}; pass the model inside it")
    places = set(model.modules())
    for name, linear in linears_of(layers).items():
        if linear not in places or (linear.base is None and linear.adopted is None):
            raise ValueError(
                f"{name} is a layer of another framework's class, which has no plain one to come back to: "
                "save_adapter(model, path), then merge_and_unload(load_adapter(plain_model, path))"
            )
    for name, layer in layers.items():
        module = layer.module if isinstance(layer, ExpertParameter) else layer
        if any(is_sharded(p) for p in module.parameters()):
            raise ValueError(
                f"{name} is sharded (DTensor, ZeRO-3), and its parts belong to the sharded model: save_adapter(model, path) in every "
                "process, then merge_and_unload(load_adapter(plain_model, path))"
            )
        if "forward" in module.__dict__:
            raise ValueError(
                f"{name}: its forward was replaced since it was adapted; take that off first (accelerate: "
                "remove_hook_from_module(model, recurse=True))"
            )
    owners = _owners(model)
    for name, layer in layers.items():
        holder = _holder(layer)
        original = _original(layer)
        tied = [other for other, module in owners.get(id(original), {}).items() if module is not holder]
        if tied and _has_update(layer):
            raise ValueError(
                f"{name}: its weight is tied to that of {', '.join(tied)}, where the update has no place; before merging "
                "untie it (layer.weight = nn.Parameter(layer.weight.detach().clone()), and in a transformers model "
                "config.tie_word_embeddings = False), or leave the layer out (exclude_modules)"
            )
        if _has_update(layer) and not layer.merged:
            # For its errors.
            layer.merged_weight()


def _original(layer: OwnLayer) -> Tensor | None:
    """The weight without the update, as the module had it."""
    if isinstance(layer, ExpertParameter):
        return layer.unmerged if layer.merged else layer.weight
    if isinstance(layer.base, LinearSlice):
        whole: SplitLinear = layer.base.whole
        return whole.weight if whole.before is None else whole.before
    original = layer._unmerged if layer.merged else _holder(layer).weight
    return original.get("weight") if isinstance(original, dict) else cast(Tensor, original)


def _has_update(layer: OwnLayer) -> bool:
    if isinstance(layer, DashLinear) and (layer.adapter is None or layer._weights is not None):
        return layer.merged
    # On meta nobody knows.
    return layer.lora_b.is_meta or bool(layer.lora_b.any()) or bool(layer.dash_sigma.any())


def _holder(layer: OwnLayer) -> nn.Module:
    """The module that has the weight."""
    if isinstance(layer, ExpertParameter):
        return layer.module
    if isinstance(layer.base, LinearSlice):
        return layer.base.whole
    return layer if layer.base is None else layer.base


def _owners(model: nn.Module) -> dict[int, dict[str, nn.Module]]:
    """The modules that have a parameter, by its id and their names."""
    found: dict[int, dict[str, nn.Module]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            found.setdefault(id(parameter), {})[plain_name(name)] = module
    return found


def _plain(layer: DashLinear) -> nn.Module:
    """The layer that a merged one stands for."""
    if layer.base is not None:
        move_hooks(layer, layer.base)
        return layer.base
    kind = cast("type[nn.Module]", layer.adopted)
    plain = kind.__new__(kind)
    nn.Module.__init__(plain)
    # Conv1D has other names for them.
    foreign = {"in_features", "out_features"} if layer.transposed else set()
    plain.__dict__.update({k: v for k, v in vars(layer).items() if k not in _OURS | _OF_ANY_MODULE | foreign})
    adapter = {*PARTS, PLACE, "base"}
    for kind_of_part in ("_parameters", "_buffers", "_modules"):
        parts = vars(layer)[kind_of_part]
        vars(plain)[kind_of_part].update({k: v for k, v in parts.items() if k not in adapter})
    return plain
