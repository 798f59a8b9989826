"""What schedules learn from hooks: which optimizers step on the adapters, and which layers get gradients."""

from __future__ import annotations

import functools
import warnings
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from . import zero
from .distributed import is_sharded
from .state import AdaptedLayer, parameter_of


def with_adapter(layers: dict[str, AdaptedLayer]) -> list[AdaptedLayer]:
    """The layers that still have it: one that was deleted, or that another framework took back, is nowhere."""
    return [layer for layer in layers.values() if hasattr(layer, "lora_a")]


class OptimizerWatch:
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
        parts = (p for layer in with_adapter(self._layers) for p in (layer.lora_a, layer.lora_b, layer.dash_sigma))
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


class GradientWatch:
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
