"""Several adapters in one model: added, switched, trained apart, mixed in one batch by row.

One adapter is active: all other functions (`prelaunch`, `merge`, `save_adapter`, `dash_parameter_groups`, ...) speak of it. Each
has settings, a phase, a step count and parameters of its own, which stay the same objects while it is parked.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from loradash_kernels.rows import NO_ADAPTER, group_rows

from .config import DashConfig
from .data_parallel import refuse_unaveraged
from .distributed import is_sharded
from .linear import DashLinear
from .model import BASE_ALONE, adapted_layers, check_adapter_name, put_in_place
from .parked import PARAMETERS, MixedRows
from .quantised import compute_device
from .state import STATE, WAITING, DashState, all_layers, dash_state, experts_of, linears_of, states, unwrap
from .targets import check_patterns, target_layers


def adapter_names(model: nn.Module) -> list[str]:
    """The names of a model's adapters, the active one first."""
    all_layers(model, "model.peft_config")
    return list(states(model))


def active_adapter(model: nn.Module) -> str:
    """The name of the adapter that computes."""
    return adapter_names(model)[0]


def add_adapter(model: nn.Module, name: str, config: DashConfig | None = None) -> nn.Module:
    """Gives an adapted model one more adapter, untrained and parked: it is not active before `set_adapter(model, name)`.

    Rank, scaling, directions, dropout, targets and the launch step are the new adapter's own. Layers that it does not target are
    the base layers while it is active; layers that only it targets become `DashLinear`. The frozen weights are shared, and so is
    what a `SpectralCache` holds of them.

    Returns the model. Raises ValueError, with the model unchanged: no adapters yet, a name that is taken or cannot be one;
    settings that match nothing; `trainable_modules` or `train_bias`, here or in another adapter, since those train parts of the
    model that all adapters share; a layer that cannot be adapted; merged layers; a sharded model. TypeError for a PEFT model.
    """
    config = config or DashConfig()
    check_new_adapter(model, name, config)
    root, active = unwrap(model), dash_state(model)
    chosen = target_layers(root, config)
    plain = {n: module for n, module in chosen.items() if not isinstance(module, DashLinear)}
    adapted = adapted_layers(root, plain, config, name)

    put_in_place(root, adapted)
    for layer in adapted.values():
        layer.activate(active.name)
    for layer_name, module in chosen.items():
        if isinstance(module, DashLinear):
            device = compute_device(module.base) if module.base is not None else module.weight.device
            module.park_new(name, config.for_module(layer_name), device)
    waiting = root.__dict__.setdefault(WAITING, {})
    waiting[name] = DashState(config, trained_before=active.trained_before, name=name)
    return model


def check_new_adapter(model: nn.Module, name: str, config: DashConfig) -> None:
    """Raises what `add_adapter` raises, but for a layer that cannot be adapted."""
    layers = linear_layers(model, "model.add_adapter(name, config)")
    known = states(model)
    check_adapter_name(name)
    if name in known:
        raise ValueError(f"the model has an adapter {name!r} already")
    if config.target_parameters is not None:
        raise ValueError("target_parameters: experts' parameters have one adapter, that of apply_dash")
    for owner, settings in {**{n: s.config for n, s in known.items()}, name: config}.items():
        if settings.trainable_modules is not None or settings.train_bias:
            raise ValueError(
                f"adapter {owner!r} trains parts of the model that all adapters would share (trainable_modules, train_bias); "
                "such an adapter must be a model's only one"
            )
    _check_movable(model, layers)
    root = unwrap(model)
    check_patterns(root, config)
    places = set(root.modules())
    foreign = [n for n, layer in layers.items() if layer not in places]
    if foreign:
        raise ValueError(f"{foreign[0]} is a layer of another framework's class, which has one adapter")


def set_adapter(model: nn.Module, name: str) -> None:
    """Makes an adapter the active one; the one that was is parked: frozen, and as it is otherwise.

    Which of an adapter's parameters train is remembered. Come here after the backward pass: autograd gives no gradient to
    parameters that were frozen since the forward pass.

    Raises ValueError, with the model unchanged: no such adapter; merged layers, or a mixed batch; a model sharded by FSDP or
    parallelize_module, which knows each parameter by its place (`hotswap_adapter` copies into the places); one inside a
    DistributedDataParallel that was made while the adapter was parked. TypeError for a PEFT model.
    """
    layers = linear_layers(model, "model.set_adapter(name)")
    state = _state_of(model, name)
    if state is dash_state(model):
        return
    _check_movable(model, layers)
    to_train = [layer.part(name, key) for layer in layers.values() for key in _trained_keys(layer, name)]
    refuse_unaveraged(unwrap(model), to_train, name)
    _switch(model, layers, name)


def _switch(model: nn.Module, layers: dict[str, DashLinear], name: str) -> None:
    root, before = unwrap(model), dash_state(model)
    for layer in layers.values():
        layer.activate(name)
    root.__dict__[STATE] = root.__dict__[WAITING].pop(name)
    root.__dict__[WAITING][before.name] = before


def _trained_keys(layer: DashLinear, name: str) -> list[str]:
    parked = dict(layer.parked_adapters()).get(name)
    return [] if parked is None else [key for key in PARAMETERS if parked.trains[key]]


@contextlib.contextmanager
def as_active(model: nn.Module, name: str | None) -> Iterator[None]:
    """Within the block an adapter is the active one, for functions that speak of that; None changes nothing.

    Which parameters train, of it and of those before, is the same after the block as before. Errors as `set_adapter`.
    """
    if name is None:
        yield
        return
    all_layers(model, "the functions of PEFT, which take adapter names themselves")
    before = dash_state(model)
    if _state_of(model, name) is before:
        yield
        return
    layers = linear_layers(model, "its own functions")
    _check_movable(model, layers)
    trained = {n for n in states(model) if n != before.name and _trains_parked(layers, n)}
    _switch(model, layers, name)
    try:
        yield
    finally:
        _switch(model, layers, before.name)
        _thaw(layers, trained)


def _trains_parked(layers: dict[str, DashLinear], name: str) -> bool:
    parked = (p for layer in layers.values() for n, p in layer.parked_adapters() if n == name)
    return any(parameter.requires_grad for module in parked for parameter in module.parameters())


def _thaw(layers: dict[str, DashLinear], names: set[str]) -> None:
    for layer in layers.values():
        for name, parked in layer.parked_adapters():
            parked.thaw(name in names)


def train_adapters(model: nn.Module, names: Iterable[str]) -> None:
    """Lets parked adapters train beside the active one, for mixed batches; those that are not named are frozen.

    Of each the parameters train that do while it is active. `set_adapter` freezes the one that it parks, and no other.

    Raises ValueError, with nothing changed, for a name that the model lacks, and for a model inside a DistributedDataParallel that
    was made while the adapter was frozen.
    """
    layers = linear_layers(model, "model.set_requires_grad(names)")
    wanted = {_state_of(model, name).name for name in names}
    for name in wanted:
        to_train = [layer.part(name, key) for layer in layers.values() for key in _trained_keys(layer, name)]
        refuse_unaveraged(unwrap(model), to_train, name)
    _thaw(layers, wanted)


def delete_adapter(model: nn.Module, name: str) -> None:
    """Takes a parked adapter out of the model, and forgets it. Layers that have no other stay, and compute the base layer.

    Raises ValueError for the active one and for a name that the model lacks; TypeError for a PEFT model.
    """
    layers = linear_layers(model, "model.delete_adapter(name)")
    if _state_of(model, name) is dash_state(model):
        raise ValueError(f"adapter {name!r} is the active one; set_adapter(model, another) before it is deleted")
    _check_movable(model, layers)
    for layer in layers.values():
        if name in layer.adapters:
            layer.remove_parked(name)
    waiting = unwrap(model).__dict__[WAITING]
    del waiting[name]
    if not waiting:
        del unwrap(model).__dict__[WAITING]


@contextlib.contextmanager
def mixed_batch(model: nn.Module, names: Sequence[str | None]) -> Iterator[nn.Module]:
    """Within the block every row of a batch has an adapter of its own: names[i] is that of row i.

        with mixed_batch(model, ["english", "french", None]):
            logits = model(input_ids=ids).logits  # of three sequences

    A row is one entry of the first dimension of every adapted layer's input; None and "base" stand for no adapter. Every layer
    multiplies with its weight once, and adds to each row the terms of its own adapter, active or parked, at whatever phase. A layer
    that an adapter leaves out adds nothing to its rows.

    To train, name the parked ones in `train_adapters` first, and have the backward pass inside the block: gradient checkpoints
    compute the forward pass again there. Dropout draws one mask for the rows of each adapter. Blocks may be nested.

    Raises ValueError for a name that the model lacks and for merged layers; in the forward pass for an input with another number of
    rows (layers whose caller puts the batch and the tokens into one dimension, or the tokens first). RuntimeError for a backward
    pass after the block, and in reentrant checkpoints. TypeError for a PEFT model, whose calls take `adapter_names`.
    """
    layers = linear_layers(model, "model(..., adapter_names=names)")
    known = states(model)
    wanted = [None if name is None or name == BASE_ALONE else name for name in names]
    for name in wanted:
        if name is not None and name not in known:
            raise ValueError(f"the model has no adapter {name!r}; it has {', '.join(known)}")
    _check_unmerged(layers)
    # In an order that is the same for all batches, so that what is compiled serves the next one.
    order = tuple(sorted(known))
    index = [NO_ADAPTER if name is None else order.index(name) for name in wanted]
    rows = {device: MixedRows(order, group_rows(index, device)) for device in set(map(_device, layers.values()))}
    before = {layer: layer._mixed_rows for layer in layers.values()}
    try:
        for layer in layers.values():
            layer._mixed_rows = rows[_device(layer)]
        yield model
    finally:
        for layer, outer in before.items():
            layer.leave_mixed_batch(outer)


def _device(layer: DashLinear) -> torch.device:
    found: Tensor = next(layer.part(name, "lora_a") for name in layer.adapters) if layer.adapters else layer.weight
    return found.device


def linear_layers(model: nn.Module, instead: str) -> dict[str, DashLinear]:
    """All adapted layers. Raises ValueError for a model with adapted experts, and TypeError for a PEFT model."""
    layers = all_layers(model, instead)
    experts = list(experts_of(layers))
    if experts:
        raise ValueError(f"{experts[0]}: experts' parameters have one adapter, and so has a model with adapted ones")
    return linears_of(layers)


def _state_of(model: nn.Module, name: str) -> DashState:
    known = states(model)
    if name not in known:
        raise ValueError(f"the model has no adapter {name!r}; it has {', '.join(known)}")
    return known[name]


def _check_unmerged(layers: dict[str, DashLinear]) -> None:
    merged = [name for name, layer in layers.items() if layer.merged]
    if merged:
        raise ValueError(f"unmerge(model) first; merged: {', '.join(merged[:4])}")


def _check_movable(model: nn.Module, layers: dict[str, DashLinear]) -> None:
    """Raises ValueError where adapters cannot be moved between the places of the active and the parked ones."""
    _check_unmerged(layers)
    mixed = [name for name, layer in layers.items() if layer._mixed_rows is not None]
    if mixed:
        raise ValueError("the adapters of a mixed batch stay where they are until its block ends")
    for name, layer in layers.items():
        own = [p for _, p in layer.named_parameters()]
        flat = layer.adapter is not None and "lora_a" not in layer._parameters
        if flat or any(is_sharded(p) or hasattr(p, "_fsdp_flattened") for p in own):
            raise ValueError(
                f"{name} is sharded, and what sharded it knows each parameter by its place: add and set adapters before, or copy "
                "another one's file into this one's place with hotswap_adapter(model, path)"
            )
