"""A run on disk, to go on from in any number of processes: torch.distributed.checkpoint, told of our two phases."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn

from .schedule import DashSchedule
from .state import dash_layers, parameter_of, plain_name


def save_training(
    folder: str | os.PathLike, model: nn.Module, optimizer: torch.optim.Optimizer, schedule: DashSchedule, **others: Any
) -> None:
    """Writes what a run needs to go on, each process its own part: adapters and whatever else trains, buffers, the
    optimizer's state, the schedule's. The frozen weights are not written: they are the base model's.

    For a model as it is, in DistributedDataParallel, sharded by FSDP2 or FSDP1, or by DTensors of any mesh; every process
    must call this.

    Args:
        folder: of torch.distributed.checkpoint's files.
        others: what else has state_dict and load_state_dict, by names of your own (a scheduler of learning rates).

    Raises RuntimeError between `optimizer.step()` and `schedule.step()`.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    model = _inside(model)
    parts = {"model": _model_state(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.save({**others, **parts, "schedule": schedule}, checkpoint_id=folder)


def load_training(
    folder: str | os.PathLike, model: nn.Module, optimizer: torch.optim.Optimizer, schedule: DashSchedule, **others: Any
) -> None:
    """Goes on from `save_training`, in as many processes as there are now, under whatever scheme: a new model with the base
    model's weights and adapters of the same settings, wrapped, its optimizer, its `DashSchedule`. Every process must call
    this.

    Raises torch.distributed.checkpoint's error (CheckpointException, or RuntimeError of the missing key) for tensors that are
    not there or of another shape, and ValueError as `DashSchedule.load_state_dict`.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_model_state_dict,
        set_optimizer_state_dict,
    )

    model = _inside(model)
    state = _model_state(model)
    dcp.load({**others, "model": state, "schedule": schedule}, checkpoint_id=folder)
    set_model_state_dict(model, state, options=StateDictOptions(strict=False))
    # Only what the checkpoint holds can be loaded, and before launch, and right after it, Δσ has no state there.
    kept = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    wanted = get_optimizer_state_dict(model, optimizer)
    states: Any = wanted["state"]
    fresh = [
        name
        for name in _names(model, ("dash_sigma",))
        if not any(key.startswith(f"optimizer.state.{name}.") for key in kept)
    ]
    for name in fresh:
        states.pop(name, None)
    dcp.load({"optimizer": wanted}, checkpoint_id=folder)
    for name in fresh:
        states[name] = {}
    set_optimizer_state_dict(model, optimizer, wanted)


def _inside(model: nn.Module) -> nn.Module:
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def _model_state(model: nn.Module) -> dict[str, Any]:
    """Everything but frozen weights. A and B are frozen too once Δσ trains alone."""
    from torch.distributed.checkpoint.state_dict import get_model_state_dict

    frozen = {plain_name(name) for name, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad}
    left_out = frozen - set(_names(model, ("lora_a", "lora_b", "dash_sigma")))
    return {name: value for name, value in get_model_state_dict(model).items() if name not in left_out}


def _names(model: nn.Module, parts: tuple[str, ...]) -> list[str]:
    """Plain names of the adapters' parameters in the whole model."""
    wanted = {id(parameter_of(getattr(layer, part))) for layer in dash_layers(model).values() for part in parts}
    return [plain_name(name) for name, p in model.named_parameters(remove_duplicate=False) if id(p) in wanted]
