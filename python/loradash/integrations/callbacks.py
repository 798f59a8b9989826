"""What the callbacks of several trainers have in common: the figures they log, what their checkpoints leave out."""

from __future__ import annotations

import warnings

import torch
from torch import nn

from ..distributed import gathered
from ..schedule import DashSchedule
from ..state import dash_layers, parameter_of, plain_name
from ..zero import is_trained_by_zero


class Figures:
    """What a run logs, of its schedule.

    dash_step, dash_directions (how many are in place) and, after launch, dash_sigma_norm (over all layers); dash_rate_mean
    and dash_rate_max of the chosen directions, with the first figures after the launch alone. Sharded Δσ is gathered: every
    process must call this.
    """

    def __init__(self, schedule: DashSchedule) -> None:
        self.schedule = schedule
        self._told = False

    @torch.no_grad()
    def __call__(self) -> dict[str, float]:
        schedule = self.schedule
        launched = [layer for layer in dash_layers(schedule.model).values() if bool(layer.launched)]
        figures: dict[str, float] = {
            "dash_step": schedule.state.step,
            "dash_directions": sum(layer.dash_vt.shape[0] for layer in launched),
        }
        if launched:
            norms = [gathered(layer.dash_sigma).float().norm().cpu() for layer in launched]
            figures["dash_sigma_norm"] = float(torch.stack(norms).norm())
        if schedule.reports and not self._told:
            rates = torch.cat([report.rate.float().cpu() for report in schedule.reports])
            figures |= {"dash_rate_mean": float(rates.mean()), "dash_rate_max": float(rates.max())}
            self._told = True
        return figures


def warn_without_launch(schedule: DashSchedule) -> None:
    """Tells at the end of training that its adapters are plain LoRA, where directions were wanted."""
    step, due = schedule.state.step, schedule.state.config.prelaunch_steps
    wanted = any(layer.dash_vt.shape[0] for layer in dash_layers(schedule.model).values())
    if wanted and not schedule.launched:
        when = f"of {due}, before launch" if step < due else f"without launch, which was due at {due}"
        warnings.warn(f"loradash: training ended at step {step} {when}: plain LoRA so far", stacklevel=3)


def refuse_zero(model: nn.Module) -> None:
    """ValueError where DeepSpeed's ZeRO has the adapters: a schedule is made of its engine, which trainers keep to themselves."""
    if any(is_trained_by_zero(parameter_of(layer.lora_a)) for layer in dash_layers(model).values()):
        raise ValueError(
            "DeepSpeed's ZeRO trains this model, and a trainer's callback does not see its engine: train by FSDP2 or DDP, or in "
            "a loop of your own with DashSchedule(engine)"
        )


def adapter_ids(model: nn.Module) -> set[int]:
    """Ids of the parameters and buffers that the adapters have in the model."""
    layers = dash_layers(model).values()
    parts = (p for m in layers for p in (m.lora_a, m.lora_b, m.dash_sigma, m.dash_u, m.dash_vt))
    return {id(parameter_of(p)) for p in parts}


def frozen_names(model: nn.Module) -> set[str]:
    """Names of the parameters that training leaves alone: all that are frozen, but for the adapters' own."""
    ours = adapter_ids(model)
    parameters = model.named_parameters(remove_duplicate=False)
    return {plain_name(name) for name, p in parameters if not p.requires_grad and id(p) not in ours}
