"""Models in units of FSDP: modules whose parameters are gathered together.

FullyShardedDataParallel (FSDP1) keeps the parameters of each of its units in one flat parameter. Between steps a parameter has its name (use_orig_params=True), but is one-dimensional, the part of it that this process holds.
In a unit's own passes it is a view of the gathered flat parameter, and so requires grad where any of the unit's does.
use_orig_params=False refuses units in which some parameters train and others are frozen, as they are in every adapted layer.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any, TypeVar

from torch import Tensor, nn

T = TypeVar("T", bound="Tensor | None")


def fsdp1_units(model: nn.Module) -> list[Any]:
    """The FSDP1 modules in a model, outer ones first. Their module is imported where there are any."""
    module = sys.modules.get("torch.distributed.fsdp.fully_sharded_data_parallel")
    return [] if module is None else [m for m in model.modules() if isinstance(m, module.FullyShardedDataParallel)]


def is_fsdp2(module: nn.Module) -> bool:
    """Was `fully_shard` called on this module?"""
    return hasattr(module, "reshard") and hasattr(module, "unshard")


@contextlib.contextmanager
def whole(model: nn.Module, write: bool = False) -> Iterator[None]:
    """Within the block all parameters are whole, in every process at once: every process must call this.

    Args:
        write: take what is written to them in the block back into the parts?
    """
    with contextlib.ExitStack() as stack:
        # The outermost comes first, and becomes the root that way.
        for unit in fsdp1_units(model):
            stack.enter_context(whole_unit(unit, write))
        yield


@contextlib.contextmanager
def whole_unit(unit: Any, write: bool = False) -> Iterator[None]:
    """`whole` for the parameters of one unit alone; for None nothing happens, nor inside summon_full_params."""
    if unit is None or unit.training_state.name == "SUMMON_FULL_PARAMS":
        yield
        return
    with unit.summon_full_params(unit, recurse=False, writeback=write):
        yield


class Units:
    """The units in a model, by the modules in them. Every process must make it at the same time."""

    def __init__(self, model: nn.Module) -> None:
        outer = fsdp1_units(model)
        if outer:
            # Whichever is asked first becomes the root.
            with whole_unit(outer[0]):
                pass
        # Those of an inner unit come last.
        self._flat = {module: unit for unit in outer for module in unit.modules()}
        self._sharded = {m: unit for unit in model.modules() if is_fsdp2(unit) for m in unit.modules()}

    @contextlib.contextmanager
    def whole(self, layer: Any) -> Iterator[bool]:
        """Within the block the parameters of an adapted layer are whole, in every process at once. Gives whether it had to do
        something. Parameters that FSDP2 keeps are gathered only for a layer that is kept whole; others can be one by one."""
        module = layer if isinstance(layer, nn.Module) else layer.layer
        with contextlib.ExitStack() as stack:
            units = dict.fromkeys(self._flat[m] for m in module.modules() if m in self._flat)
            for unit in units:
                stack.enter_context(whole_unit(unit))
            sharded = (
                {}
                if layer.base is None
                else dict.fromkeys(self._sharded[m] for m in module.modules() if m in self._sharded)
            )
            for unit in sharded:
                unit.unshard()
                stack.callback(unit.reshard)
            yield bool(units or sharded)

    def has(self, layer: Any) -> bool:
        """Is a layer in a unit of FSDP1?"""
        module = layer if isinstance(layer, nn.Module) else layer.layer
        return any(m in self._flat for m in module.modules())


def as_declared(module: nn.Module, name: str, view: T) -> T:
    """A parameter as a layer's forward pass sees it, without the gradient that a frozen one is given as a view of the flat
    parameter. Any other tensor comes back as it is."""
    flat = None if view is None else view._base
    if view is None or not hasattr(flat, "_param_infos") or flat._params is None:
        return view
    for parameter, (own, holder, _) in zip(flat._params, flat._param_infos, strict=True):
        if holder is module and own == name:
            return view if parameter.requires_grad else view.detach()  # type: ignore[return-value]
    for parameter, shared in zip(flat._shared_params, flat._shared_param_infos, strict=True):
        if shared[1] is module and shared[0] == name:
            return view if parameter.requires_grad else view.detach()  # type: ignore[return-value]
    return view
