"""A run on disk, to go on from in any number of processes: torch.distributed.checkpoint, told of our two phases."""

from __future__ import annotations

import contextlib
import json
import os
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .distributed import place
from .model import refuse_refreezing
from .schedule import DashSchedule, check_state
from .state import (
    dash_layers,
    host_of,
    parameter_of,
    parked_parameters,
    plain_name,
    state_and_layers,
    states,
    training_parked,
)
from .units import fsdp1_units
from .zero import is_trained_by_zero

# How far an optimizer has come, beside what DashSchedule knows: has it stepped anything, and the Δσ of which adapters?
_STEPPED, _SIGMA_STEPPED = "optimizer_stepped", "sigma_stepped"
_ADAPTERS = "adapters"


def save_training(
    folder: str | os.PathLike,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    schedule: DashSchedule | None,
    **others: Any,
) -> None:
    """Writes what a run needs to go on, each process its own part: all adapters and whatever else trains, buffers, the
    optimizer's state, the schedule's. The frozen weights are not written: they are the base model's.

    For a model as it is, in DistributedDataParallel, sharded by FSDP2 or FSDP1, by DTensors of any mesh, or one stage of a
    pipeline, whose parameters have names of their own; every process must call this.

    Args:
        folder: of torch.distributed.checkpoint's files.
        optimizer, schedule: None, both, in a stage of a pipeline in which nothing trains.
        others: what else has state_dict and load_state_dict, by names of your own (a scheduler of learning rates).

    Raises RuntimeError between `optimizer.step()` and `schedule.step()`, ValueError under DeepSpeed's ZeRO.
    """
    import torch.distributed.checkpoint as dcp

    model = _inside(model)
    stepped = _steps_taken(model, optimizer)
    with _complete(model, optimizer) as optimizer_state:
        parts = {**_parts(model, optimizer_state, schedule), **others, **stepped}
        dcp.save(parts if schedule is None else {**parts, _ADAPTERS: json.dumps(_steps(model))}, checkpoint_id=folder)


def load_training(
    folder: str | os.PathLike,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    schedule: DashSchedule | None,
    **others: Any,
) -> None:
    """Goes on from `save_training`, in as many processes as there are now, under whatever scheme: a new model with the base
    model's weights and adapters of the same settings, wrapped, its optimizer, its `DashSchedule`. Every process must call
    this.

    Raises torch.distributed.checkpoint's CheckpointException where a tensor or the folder is not there or does not fit, and
    ValueError as `DashSchedule.load_state_dict` and where another adapter is active, or there are others, with nothing changed.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_model_state_dict,
        set_model_state_dict,
        set_optimizer_state_dict,
    )

    model, flat = _inside(model), StateDictOptions(flatten_optimizer_state_dict=True)
    if schedule is not None:
        told: dict[str, Any] = {"schedule": schedule.state_dict(), _ADAPTERS: ""}
        dcp.load(told, checkpoint_id=folder)
        steps = json.loads(told[_ADAPTERS])
        _check_adapters(model, steps)
        check_state(told["schedule"], schedule.state.config.prelaunch_steps)
        refuse_refreezing(model, told["schedule"]["dash_only"])
    with _complete(model, optimizer) as optimizer_state:
        state = {**_parts(model, optimizer_state, schedule), **others, _STEPPED: False, _SIGMA_STEPPED: ""}
        dcp.load(state, checkpoint_id=folder)
    # FSDP1 warns of each weight that is not set.
    values = get_model_state_dict(model) | state["model"] if fsdp1_units(model) else state["model"]
    set_model_state_dict(model, values, options=StateDictOptions(strict=False))
    if schedule is not None:
        _waiting_since(model, steps)
    if optimizer is None:
        return
    set_optimizer_state_dict(model, optimizer, optimizer_state, options=flat)
    # What has no state yet got one for the sake of the files, which is not that of a first step.
    if not state[_STEPPED]:
        optimizer.state.clear()
        return
    for adapter, sigmas in _sigmas(model).items():
        for sigma in sigmas if adapter not in json.loads(state[_SIGMA_STEPPED]) else ():
            optimizer.state.pop(sigma, None)


def _steps(model: nn.Module) -> dict[str, int]:
    """The steps of every adapter, the active one first."""
    return {name: state.step for name, state in states(model).items()}


def _check_adapters(model: nn.Module, found: dict[str, int]) -> None:
    """Raises ValueError where a checkpoint has other adapters than the model, or another one is active."""
    ours = list(states(model))
    if set(ours) != set(found):
        raise ValueError(f"the checkpoint has the adapters {', '.join(found)}, the model has {', '.join(ours)}")
    active = next(iter(found))
    if ours[0] != active:
        raise ValueError(
            f"in the checkpoint the adapter {active!r} is active, and in the model {ours[0]!r}: set_adapter(model, {active!r}), "
            "then make the optimizer and the schedule"
        )


def _waiting_since(model: nn.Module, steps: dict[str, int]) -> None:
    """The schedule counts the active adapter's steps."""
    for name, state in list(states(model).items())[1:]:
        state.step = steps[name]


def _parts(model: nn.Module, optimizer_state: dict[str, Any], schedule: DashSchedule | None) -> dict[str, Any]:
    parts = {"model": _model_state(model), "optimizer": optimizer_state, "schedule": schedule}
    return {name: part for name, part in parts.items() if part is not None}


def _inside(model: nn.Module) -> nn.Module:
    if any(map(is_trained_by_zero, model.parameters())):
        raise ValueError(
            "DeepSpeed's ZeRO keeps parts and copies that torch.distributed.checkpoint does not know: "
            "engine.save_checkpoint(folder, client_state={'schedule': schedule.state_dict()}) and engine.load_checkpoint"
        )
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def _model_state(model: nn.Module) -> dict[str, Any]:
    """Everything but frozen weights. A and B are frozen too once Δσ trains alone, and all of an adapter that is not active."""
    from torch.distributed.checkpoint.state_dict import get_model_state_dict

    layers = dash_layers(model).values()
    ours = {id(parameter_of(p)) for layer in layers for p in (layer.lora_a, layer.lora_b, layer.dash_sigma)}
    # Adapters that are not active are frozen, and are part of the run.
    ours |= set() if host_of(model) is not None else {id(p) for _, p in parked_parameters(model)}
    parameters = model.named_parameters(remove_duplicate=False)
    frozen = {plain_name(name) for name, p in parameters if not p.requires_grad and id(p) not in ours}
    return {name: value for name, value in get_model_state_dict(model).items() if name not in frozen}


def _sigmas(model: nn.Module) -> dict[str, list[Tensor]]:
    """The Δσ of the adapters that train: of the active one, and of those that train beside it."""
    state, active = state_and_layers(model)
    if state is None:
        return {}
    beside = [] if host_of(model) is not None else list(states(model))[1:]
    layers = {state.name: active, **{name: training_parked(model, name) for name in beside}}
    return {name: [parameter_of(layer.dash_sigma) for layer in found.values()] for name, found in layers.items()}


def _steps_taken(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> dict[str, Any]:
    """Has an optimizer any state, and of the Δσ of which adapters, in any process?"""
    state = {} if optimizer is None else optimizer.state
    ours = bool(state), [name for name, found in _sigmas(model).items() if any(state.get(sigma) for sigma in found)]
    processes = place()[1]
    found = [ours] * processes
    if processes > 1:
        torch.distributed.all_gather_object(found, ours)
    stepped = sorted({name for _, names in found for name in names})
    return {_STEPPED: any(any_state for any_state, _ in found), _SIGMA_STEPPED: json.dumps(stepped)}


@contextlib.contextmanager
def _complete(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> Iterator[dict[str, Any]]:
    """The optimizer's state by the parameters' names, in which Δσ has its place in either phase, so that any checkpoint fits
    any run. Afterwards the optimizer is what it was before."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

    if optimizer is None:
        yield {}
        return
    before = dict(optimizer.state)
    if before:
        optimizer.state.update(
            _new_state(optimizer, [s for found in _sigmas(model).values() for s in found if not before.get(s)])
        )
    try:
        yield get_optimizer_state_dict(model, optimizer, options=StateDictOptions(flatten_optimizer_state_dict=True))
    finally:
        for parameter in optimizer.state.keys() - before.keys():
            del optimizer.state[parameter]


def _new_state(optimizer: torch.optim.Optimizer, parameters: list[Tensor]) -> dict[Tensor, Any]:
    """The state that an optimizer makes for parameters at its first step, which changes none: gradients and rates are 0."""
    new = {id(p) for p in parameters}
    groups = [{**g, "lr": 0.0, "params": [p for p in g["params"] if id(p) in new]} for g in optimizer.param_groups]
    scratch = type(optimizer).__new__(type(optimizer))
    scratch.__setstate__(
        {"defaults": optimizer.defaults, "state": defaultdict(dict), "param_groups": [g for g in groups if g["params"]]}
    )
    gradients = [p.grad for p in parameters]
    try:
        for p in parameters:
            p.grad = torch.zeros_like(p)
        # As torch.distributed.checkpoint calls it, and as DashSchedule knows it.
        scratch.step(closure=None)
    finally:
        for p, gradient in zip(parameters, gradients, strict=True):
            p.grad = gradient
    return dict(scratch.state)
