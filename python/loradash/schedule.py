"""Counts optimizer steps and launches the dash phase at the right one."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import nn

from . import zero
from .adapters import as_active
from .cache import SpectralCache
from .distributed import Group, gathered
from .experts import ExpertParameter
from .linear import DashLinear
from .model import train_sigma_alone
from .prelaunch import LayerReport, prelaunch
from .state import AdaptedLayer, OneAdapter, dash_layers, dash_state, parameter_of, state_and_layers, training_parked
from .units import Units, fsdp1_units
from .watches import GradientWatch, OptimizerWatch, with_adapter


class DashSchedule:
    """Call `step()` once after every `optimizer.step()`; at `config.prelaunch_steps` it launches the directions.

    The count lives on the model (`dash_state`), so `save_adapter` and `load_adapter` carry it: a resumed run goes on
    where it stopped. A checkpoint of the model's state dict lacks the count: `state_dict` has it, in the form that
    accelerate's `register_for_checkpointing(schedule)` wants. All parameters, Δσ included, exist from the start; the
    optimizer needs no new group. Until launch the optimizer is kept from Δσ, so that Adam's first steps on it are those of
    a fresh Adam, as in the authors' code.

    Optimizers of torch.optim are watched: a step that GradScaler skipped, or a call in the middle of gradient
    accumulation, does not count. Steps of any other kind of optimizer are counted by the calls alone. After the first
    step, layers whose B got no gradient are named in a warning.

    Under DeepSpeed's ZeRO it is made of the engine, `DashSchedule(engine)`, after deepspeed.initialize, whose optimizer has
    Δσ in a parameter group of its own (`dash_parameter_groups`): ValueError otherwise.

    Args:
        cache: decompositions of the frozen weights: `SpectralCache().start(model)` fills it while the first steps train.
        group: the processes that have the same layers, which share the work of launching. All by default; "self" for a stage
            of a pipeline that one process computes, a ProcessGroup for one that several do.

    Attributes:
        reports: what `prelaunch` found, once launched in this process.
    """

    def __init__(
        self, model: nn.Module, progress: bool = True, cache: SpectralCache | None = None, group: Group = "world"
    ) -> None:
        if cache is not None and not isinstance(cache, SpectralCache):
            raise TypeError(
                f"cache must be a SpectralCache (what its start returns runs beside), got {type(cache).__name__}"
            )
        self.state = dash_state(model)
        self.model = model
        self.progress = progress
        self.cache = cache
        self.group = group
        self.reports: list[LayerReport] = []
        self._number = self.state.claim()
        self._layers = _as_now(dash_layers(model))
        self._settled = self.launched
        self._flags: list[tuple[int, int]] = []
        # The phase that a loaded state speaks of, until the model was seen in it.
        self._phase: bool | None = None
        self._flat = self._flat_groups()
        self._watch_training(gradients=not self._settled)

    def _watch_training(self, gradients: bool) -> None:
        self._watch = OptimizerWatch(self._layers, self._before_optimizer, self._flat)
        self._gradients = GradientWatch(self._layers) if gradients else None

    def _flat_groups(self) -> zero.FlatGroups | None:
        """What a DeepSpeed engine around the model steps on, looked at."""
        found = zero.FlatGroups.of(zero.engine_in(self.model))
        if found is None:
            return None
        kept = [n for n, m in self._layers.items() if not _is_gathered_in_forward(m)]
        if kept:
            raise ValueError(
                f"ZeRO-3 gathers the weights of {', '.join(kept[:4])} for these layers alone, where pre-launch cannot read them "
                "(layers kept whole, and PEFT's): train with ZeRO-2 or FSDP2"
            )
        adapters = {
            f"{n}.{key}": parameter_of(getattr(m, key)) for n, m in self._layers.items() for key in ("lora_a", "lora_b")
        }
        found.check(adapters, self._sigmas(), self._settled)
        return found

    def _sigmas(self) -> dict[str, torch.Tensor]:
        return {f"{n}.dash_sigma": parameter_of(layer.dash_sigma) for n, layer in self._layers.items()}

    def __getstate__(self) -> dict[str, Any]:
        """A copy, made together with a copy of the model, watches that one; it is none of a DeepSpeed engine, which has no copies."""
        return {**vars(self), "_watch": None, "_flat": None, "_gradients": self._gradients is not None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._watch_training(gradients=state["_gradients"])

    @property
    def launched(self) -> bool:
        """Has any layer its directions?"""
        return any(bool(layer.launched) for layer in with_adapter(self._layers))

    def step(self) -> bool:
        """Counts one optimizer step. Returns True at the step that launches.

        A launch that failed or was interrupted is tried again at the next step. Raises RuntimeError where a later
        DashSchedule counts for this model, and where a layer lost its adapter since this one was made.
        """
        if self.state.schedules != self._number:
            raise RuntimeError("a later DashSchedule counts for this model; step that one")
        self._check_phase()
        stepped, correction = self._watch.since_last()
        self.state.step += int(stepped) - correction
        layers = self._layers_now(stepped)
        if not stepped:
            return False
        self._look_after_layers(layers)
        if self.state.step < self.state.config.prelaunch_steps or self._is_settled():
            return False
        # A skipped step, or a learning rate of 0, leaves B at zero.
        if not self._has_update():
            return False
        with self._active():
            self.reports = prelaunch(self.model, self.progress, self.cache, group=self.group)
        self._settled = True
        return True

    @property
    def is_behind(self) -> bool:
        """Did an optimizer take a step that was not counted yet?"""
        return self._watch.taken > 0

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs beside the model's and the optimizer's state: numbers and booleans, ready for JSON.

        Raises RuntimeError between `optimizer.step()` and `step()`, where the model is a step ahead of the count.
        """
        if self.is_behind:
            raise RuntimeError("the optimizer took a step that was not counted yet; call schedule.step() before saving")
        return {
            "step": self.state.step,
            "launched": self.launched,
            "prelaunch_steps": self.state.config.prelaunch_steps,
            "dash_only": self.state.dash_only,
            "watched": self._watch.seen,
            "assumed": self._watch.assumed,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from `state_dict()`, with the same kind of optimizer. The model's own state may be loaded before or after.

        Raises ValueError, with nothing changed, for what is no such state, and for one of another `prelaunch_steps`. Where
        the model is in another phase than the state says when training goes on, RuntimeError before the optimizer steps.
        """
        check_state(state, self.state.config.prelaunch_steps)
        if state["dash_only"] or self.state.dash_only:
            with self._active():
                train_sigma_alone(self.model, state["dash_only"])
        self.state.step, self._phase = state["step"], state["launched"]
        self._watch.seen, self._watch.assumed, self._watch.taken = state["watched"], state["assumed"], 0

    def _check_phase(self) -> None:
        if self._phase is None:
            return
        launched = self.launched
        if launched != self._phase:
            words = {True: "after launch", False: "before launch"}
            raise RuntimeError(
                f"the schedule's state is of step {self.state.step}, {words[self._phase]}, and the model's is from "
                f"{words[launched]}: load both from one checkpoint"
            )
        self._phase = None

    def _active(self) -> contextlib.AbstractContextManager[None]:
        """Within the block the adapter is the active one."""
        is_active = dash_state(self.model) is self.state
        return as_active(self.model, None if is_active else self.state.name)

    def _has_update(self) -> bool:
        units = Units(self.model)
        for layer in self._layers.values():
            with units.whole(layer):
                if bool(gathered(layer.lora_b).any()):
                    return True
        return False

    def _is_settled(self) -> bool:
        """`launched`, but read from the device only after somebody wrote it: this is asked before every optimizer step.

        Prelaunch, load_adapter and load_state_dict may write it at any time. A prelaunch that found nothing to launch
        settles the matter too.
        """
        flags = [(id(layer.launched), layer.launched._version) for layer in with_adapter(self._layers)]
        if flags != self._flags:
            self._flags, self._settled = flags, self.launched
        return self._settled

    def _before_optimizer(self) -> None:
        """Δσ gets zero gradients before launch: they would only spend the bias correction of its first steps."""
        self._check_phase()
        if self._is_settled():
            return
        for layer in with_adapter(self._layers):
            parameter_of(layer.dash_sigma).grad = None
        if self._flat is not None:
            self._flat.hold_back(self._sigmas())

    def _layers_now(self, stepped: bool) -> dict[str, AdaptedLayer]:
        """The layers that have the adapter. Raises RuntimeError where it is neither active nor trains in mixed batches, and
        where the adapters are gone and were trained all the same."""
        state, layers = state_and_layers(self.model)
        if state is None and not stepped:
            return {}
        if state is None:
            raise RuntimeError(
                "the model has no LoRA-Dash adapters any more; count its steps no longer, or adapt it and make a new DashSchedule"
            )
        if state is not self.state:
            layers = training_parked(self.model, self.state.name)
        if not layers:
            raise RuntimeError(
                "another adapter is active than the one that this DashSchedule was made for; each has a schedule of its own, and "
                "is stepped while it is the active one, or trains in mixed batches"
            )
        return _as_now(layers)

    def _look_after_layers(self, layers: dict[str, AdaptedLayer]) -> None:
        present = set(layers.values())
        lost = [name for name, layer in self._layers.items() if layer not in present]
        if lost:
            raise RuntimeError(
                f"adapted layers were replaced since DashSchedule was made: {', '.join(lost[:4])}; change the model (resize "
                "embeddings, quantise, convert) before apply_dash"
            )
        if self._gradients is not None:
            self._gradients.report(trained=self._watch.seen, flat=bool(fsdp1_units(self.model)))
            self._gradients = None


def _as_now(layers: dict[str, AdaptedLayer]) -> dict[str, AdaptedLayer]:
    """The layers with the adapters that are active now, whichever are later."""
    found = {
        name: OneAdapter(layer, layer.adapter) if isinstance(layer, DashLinear) and layer.adapter is not None else layer
        for name, layer in layers.items()
    }
    return cast("dict[str, AdaptedLayer]", found)


def _is_gathered_in_forward(layer: AdaptedLayer) -> bool:
    """Is its weight, where ZeRO-3 keeps it in parts, one of a `DashLinear`'s own?"""
    own = layer.layer if isinstance(layer, OneAdapter) else layer
    return not zero.is_partitioned(layer.weight) or (isinstance(own, DashLinear | ExpertParameter) and own.base is None)


_STATE = {"step": int, "launched": bool, "prelaunch_steps": int, "dash_only": bool, "watched": bool, "assumed": int}
"""What `DashSchedule.state_dict` holds; integers are at least 0."""


def check_state(state: Mapping[str, Any], prelaunch_steps: int) -> None:
    if not isinstance(state, Mapping) or state.keys() != _STATE.keys():
        found = sorted(map(str, state)) if isinstance(state, Mapping) else repr(state)
        raise ValueError(f"the state of a DashSchedule has {sorted(_STATE)}, got {found}")
    for name, kind in _STATE.items():
        if type(state[name]) is not kind or state[name] < 0:
            wanted = "an integer of at least 0" if kind is int else "True or False"
            raise ValueError(f"{name} in the state of a DashSchedule must be {wanted}, got {state[name]!r}")
    if state["prelaunch_steps"] != prelaunch_steps:
        raise ValueError(
            f"the state of the DashSchedule was saved with prelaunch_steps={state['prelaunch_steps']}, the model has "
            f"{prelaunch_steps}; resume with the settings of the run that saved it"
        )
