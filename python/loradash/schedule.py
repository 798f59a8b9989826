"""Counts optimizer steps and launches the dash phase at the right one."""

from __future__ import annotations

import functools
import warnings
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from . import zero
from .cache import SpectralCache
from .distributed import Group, gathered, is_sharded
from .linear import DashLinear
from .model import train_sigma_alone
from .prelaunch import LayerReport, prelaunch
from .state import AdaptedLayer, dash_layers, dash_state, parameter_of, state_and_layers
from .units import Units, fsdp1_units


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
        self._layers = dash_layers(model)
        self._settled = self.launched
        self._flags: list[tuple[int, int]] = []
        # The phase that a loaded state speaks of, until the model was seen in it.
        self._phase: bool | None = None
        self._flat = self._flat_groups()
        self._watch_training(gradients=not self._settled)

    def _watch_training(self, gradients: bool) -> None:
        self._watch = _OptimizerWatch(self._layers, self._before_optimizer, self._flat)
        self._gradients = _GradientWatch(self._layers) if gradients else None

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
        return any(bool(layer.launched) for layer in self._layers.values())

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
        if not stepped:
            return False
        self._look_after_layers()
        if self.state.step < self.state.config.prelaunch_steps or self._is_settled():
            return False
        # A skipped step, or a learning rate of 0, leaves B at zero.
        if not self._has_update():
            return False
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
        flags = [(id(layer.launched), layer.launched._version) for layer in self._layers.values()]
        if flags != self._flags:
            self._flags, self._settled = flags, self.launched
        return self._settled

    def _before_optimizer(self) -> None:
        """Δσ gets zero gradients before launch: they would only spend the bias correction of its first steps."""
        self._check_phase()
        if self._is_settled():
            return
        for layer in self._layers.values():
            parameter_of(layer.dash_sigma).grad = None
        if self._flat is not None:
            self._flat.hold_back(self._sigmas())

    def _look_after_layers(self) -> None:
        state, layers = state_and_layers(self.model)
        if state is None:
            raise RuntimeError(
                "the model has no LoRA-Dash adapters any more; count its steps no longer, or adapt it and make a new DashSchedule"
            )
        if state is not self.state:
            raise RuntimeError(
                "another adapter is active than the one that this DashSchedule was made for; each has a schedule of its own, and "
                "is stepped while it is the active one"
            )
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


class _OptimizerWatch:
    """Counts the steps that torch.optim's optimizers take on the adapters, by hooks on all of them."""

    def __init__(
        self, layers: dict[str, AdaptedLayer], before: Callable[[], None], flat: zero.FlatGroups | None
    ) -> None:
        self._layers = layers
        self._flat = flat
        self._before = weakref.WeakMethod(before)
        # Steps since the last call, calls that were taken for steps, and whether any optimizer showed itself.
        self.taken = 0
        self.assumed = 0
        self.seen = False
        # Is the step that runs now one that only makes an optimizer's state?
        self._empty = False
        watch = weakref.ref(self)
        handles = (
            register_optimizer_step_pre_hook(functools.partial(_call, watch, "_about_to_step")),
            register_optimizer_step_post_hook(functools.partial(_call, watch, "_stepped")),
        )
        weakref.finalize(self, _remove, handles)

    def since_last(self) -> tuple[bool, int]:
        """Was a step taken since the last call, and how many assumed before were none?

        A step a call is assumed until an optimizer that can be watched shows itself: only then is it known that
        GradScaler skipped the ones before, as it does with the first of most runs.
        """
        if not self.seen:
            self.assumed += 1
            return True, 0
        stepped, correction = self.taken > 0, self.assumed
        self.taken = self.assumed = 0
        return stepped, correction

    def _about_to_step(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict[str, Any]) -> Any:
        """What happens before the step, and again after every call of its closure, which makes new gradients."""
        before = self._before()
        if before is None or not self._is_ours(optimizer):
            self._check_seen()
            return None
        self._empty = _only_makes_state(optimizer, kwargs)
        if self._empty:
            return None
        before()
        # args holds the optimizer itself first, and then what its step was called with.
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if not callable(closure):
            return None

        def followed() -> Any:
            loss = closure()
            before()
            return loss

        if "closure" in kwargs:
            return args, {**kwargs, "closure": followed}
        return (args[0], followed, *args[2:]), kwargs

    def _stepped(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if self._is_ours(optimizer) and not self._empty:
            self.seen = True
            # Fused optimizers skip steps themselves, by what GradScaler tells them.
            overflow = getattr(optimizer, "found_inf", None)
            self.taken += overflow is None or not bool(overflow)

    def _check_seen(self) -> None:
        """Under ZeRO no optimizer has the adapters themselves: it would go unseen, and step on Δσ from the start."""
        held = self._flat is None and any(
            zero.is_trained_by_zero(a) for m in self._layers.values() if (a := getattr(m, "lora_a", None)) is not None
        )
        if held:
            raise RuntimeError(
                "DeepSpeed's ZeRO trains this model: make its DashSchedule of the engine, DashSchedule(engine)"
            )

    def _is_ours(self, optimizer: torch.optim.Optimizer) -> bool:
        if self._flat is not None:
            return optimizer is self._flat.optimizer
        # A layer that another framework took back has none.
        layers = [layer for layer in self._layers.values() if hasattr(layer, "lora_a")]
        parts = (p for layer in layers for p in (layer.lora_a, layer.lora_b, layer.dash_sigma))
        ours = {id(parameter_of(p)) for p in parts}
        return any(id(p) in ours for group in optimizer.param_groups for p in group["params"])


def _only_makes_state(optimizer: torch.optim.Optimizer, kwargs: Mapping[str, Any]) -> bool:
    """Is a step the one by which torch.distributed.checkpoint makes the state of an optimizer that it will load?

    torch.distributed.checkpoint.state_dict calls step(closure=None) of an optimizer without state, with rates of zero and
    zero gradients for all that trains. Δσ too gets its state by that, and nothing was trained.
    """
    if optimizer.state or kwargs.get("closure", optimizer) is not None:
        return False
    groups = optimizer.param_groups
    still = all(float(group.get("lr", 0.0)) == 0.0 for group in groups)
    gradients = (p.grad for group in groups for p in group["params"] if p.grad is not None)
    # This process's part of a sharded one tells enough: all of them are zero, or there is a step.
    return still and not any(bool((g.to_local() if is_sharded(g) else g).any()) for g in gradients)


def _call(watch: weakref.ref, method: str, optimizer: torch.optim.Optimizer, *arguments: Any) -> Any:
    """A hook on all optimizers must not keep the watch, and by it the model, alive."""
    found = watch()
    return None if found is None else getattr(found, method)(optimizer, *arguments)


def _remove(handles: tuple) -> None:
    for handle in handles:
        handle.remove()


def _is_gathered_in_forward(layer: AdaptedLayer) -> bool:
    """Is its weight, where ZeRO-3 keeps it in parts, one of a `DashLinear`'s own?"""
    return not zero.is_partitioned(layer.weight) or (isinstance(layer, DashLinear) and layer.base is None)


class _GradientWatch:
    """Notes which layers' B gets a gradient: one that gets none is unused, or its parent passes it by."""

    def __init__(self, layers: dict[str, AdaptedLayer]) -> None:
        self._all = layers
        self._layers = {name: layer for name, layer in layers.items() if layer.lora_b.requires_grad}
        self._arrived: set[str] = set()
        self._handles = [
            layer.lora_b.register_hook(functools.partial(self._note, name)) for name, layer in self._layers.items()
        ]

    def _note(self, name: str, gradient: torch.Tensor) -> None:
        self._arrived.add(name)

    def report(self, trained: bool, flat: bool) -> None:
        """Warns, and ends the watch.

        Args:
            trained: did an optimizer step for certain, whoever got gradients?
            flat: are there units of FSDP1? Like FSDP2 it sets the gradients of its parameters without calling hooks.
        """
        for handle in self._handles:
            handle.remove()
        # A finetuning callback may have thawed B since.
        if not self._layers and not any(layer.lora_b.requires_grad for layer in self._all.values()):
            warnings.warn("loradash: no adapter trains, every lora_b is frozen (requires_grad=False)", stacklevel=4)
        # Loading may have frozen B since.
        looked_at = {n: layer for n, layer in self._layers.items() if layer.lora_b.requires_grad and not flat}
        missing = [n for n, layer in looked_at.items() if n not in self._arrived and not is_sharded(layer.lora_b)]
        if missing and (trained or self._arrived):
            warnings.warn(
                f"loradash: no gradient for {len(missing)} of {len(self._layers)} adapted layers in the first step: "
                f"{', '.join(missing[:4])}{', ...' if len(missing) > 4 else ''}. They were not used, or their parent "
                "multiplies by their weight without calling them and gives the base model's output",
                stacklevel=4,
            )


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
