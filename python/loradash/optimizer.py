"""Parameter groups for an optimizer: Δσ apart from A and B."""

from __future__ import annotations

import math
import numbers
from typing import Any

from torch import nn

from .state import dash_layers, dash_state, parameter_of, parked_parameters, plain_name


def dash_parameter_groups(
    model: nn.Module,
    lr: float,
    sigma_lr: float | None = None,
    weight_decay: float = 0.0,
    sigma_weight_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """All parameters of a model that train, once each, in groups for an optimizer of torch.optim.

        optimizer = torch.optim.AdamW(dash_parameter_groups(model, lr=2e-4, sigma_lr=2e-3, weight_decay=0.01))

    | group | what | lr | weight decay |
    |---|---|---|---|
    | "adapters" | A and B | lr | weight_decay |
    | "sigma" | Δσ | sigma_lr | sigma_weight_decay |
    | "others" | `config.trainable_modules`, and what else trains | lr | weight_decay |
    | "others_no_decay" | their biases and norms, biases of adapted layers | lr | 0 |

    A group without members is left out. Beside these keys each has its "name", which Lightning's LearningRateMonitor shows,
    and the "names" of its parameters. Schedulers scale every group's rate by the same factor, so sigma_lr / lr stays.

    Δσ has a group of its own since it is the one parameter with the scale of W: s numbers a layer that have to move by the
    order of the singular values they change, where Adam moves any number by its rate a step. It does not decay by default,
    as biases and norms do not: decay would pull the chosen directions back to the pretrained W, against what they are for,
    and has no large matrix to keep small.

    transformers' Trainer takes the optimizer as `Trainer(model, args, optimizers=(optimizer, None))` and makes its own
    scheduler for it. Make the groups after `fully_shard`, which replaces the parameters; DistributedDataParallel and
    torch.compile leave them as they are.

    Args:
        model: adapted by `apply_dash`, a PEFT model with LORADASH adapters, or anything around one.
        lr: rate of all groups but Δσ's; positive.
        sigma_lr: rate of Δσ; None takes lr.
        weight_decay, sigma_weight_decay: at least 0.

    Raises ValueError for a model without adapters or in which nothing trains, for one in which the weights of adapted layers
    train, which no adapter file would hold, and for a number out of range.
    """
    _check("lr", lr, positive=True)
    _check("sigma_lr", lr if sigma_lr is None else sigma_lr, positive=True)
    _check("weight_decay", weight_decay)
    _check("sigma_weight_decay", sigma_weight_decay)
    dash_state(model)
    groups: dict[str, dict[str, Any]] = {
        "adapters": {"lr": lr, "weight_decay": weight_decay},
        "sigma": {"lr": lr if sigma_lr is None else sigma_lr, "weight_decay": sigma_weight_decay},
        "others": {"lr": lr, "weight_decay": weight_decay},
        "others_no_decay": {"lr": lr, "weight_decay": 0.0},
    }
    ours: dict[int, str] = {}
    layers = dash_layers(model)
    thawed = [name for name, layer in layers.items() if layer.weight.requires_grad]
    if thawed:
        raise ValueError(
            f"the weights of adapted layers train, {', '.join(thawed[:4])}{', ...' if len(thawed) > 4 else ''}, beside adapters "
            "that stand for their updates: freeze them (weight.requires_grad_(False)), or leave the layers out (exclude_modules)"
        )
    for layer in layers.values():
        ours |= {
            id(layer.lora_a): "adapters",
            id(layer.lora_b): "adapters",
            id(parameter_of(layer.dash_sigma)): "sigma",
        }
    # Parked ones train in mixed batches, where train_adapters asked for that.
    ours |= {id(p): "sigma" if key == "dash_sigma" else "adapters" for key, p in parked_parameters(model)}
    undecayed = _undecayed(model)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kind = ours.get(id(parameter), "others_no_decay" if id(parameter) in undecayed else "others")
            groups[kind].setdefault("params", []).append(parameter)
            groups[kind].setdefault("names", []).append(plain_name(name))
    found = [{"name": name, **group} for name, group in groups.items() if "params" in group]
    if not found:
        raise ValueError("nothing of the model trains: every parameter has requires_grad=False")
    return found


def _check(name: str, value: Any, positive: bool = False) -> None:
    number = isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
    if not number or value < 0 or (positive and value == 0):
        wanted = "a positive finite number" if positive else "a finite number of at least 0"
        raise ValueError(f"{name} must be {wanted}, got {value!r}")


def _undecayed(model: nn.Module) -> set[int]:
    """Biases by their name, and parameters of norms by their module's class, as transformers' Trainer has it."""
    return {
        id(parameter)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if "bias" in name or "norm" in type(module).__name__.lower()
    }
