"""Models in units of FSDP: modules whose parameters are gathered together.

FullyShardedDataParallel (FSDP1) keeps the parameters of each of its units in one flat parameter. Between steps a parameter
has its name (use_orig_params=True), but is one-dimensional, the part of it that this process holds. In a unit's own passes it
is a view of the gathered flat parameter, and so requires grad where any of the unit's does. use_orig_params=False refuses
units in which some parameters train and others are frozen, as they are in every adapted layer.
"""

from __future__ import annotations

import contextlib
import itertools
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
        # An inner unit comes after the outer one, and takes its modules from it.
        self._flat = {module: unit for unit in outer for module in unit.modules()}
        self._sharded: dict[nn.Module, Any] = {
            m: unit for unit in model.modules() if is_fsdp2(unit) for m in unit.modules()
        }

    @contextlib.contextmanager
    def whole(self, layer: Any, write: bool = False) -> Iterator[bool]:
        """Within the block the parameters that FSDP1 has of an adapted layer, or of any module, are whole, in every process at
        once; with `write` what is written to them stays. Gives whether it had to do something.

        Those of FSDP2 can be gathered one by one (`distributed.gathered`), and are written as they are.
        """
        with contextlib.ExitStack() as stack:
            flat = dict.fromkeys(self._flat[m] for m in _module_of(layer).modules() if m in self._flat)
            for unit in flat:
                stack.enter_context(whole_unit(unit, write))
            yield bool(flat)

    @contextlib.contextmanager
    def computing(self, layer: Any) -> Iterator[bool]:
        """`whole`, and an adapted layer that is kept whole can be asked for its products: its parameters in FSDP2 are gathered as for a
        forward pass, in the dtype in which that computes. Adapters are not to be read from it."""
        module = _module_of(layer)
        with contextlib.ExitStack() as stack:
            flat = stack.enter_context(self.whole(layer))
            asked = layer.base is not None
            sharded = dict.fromkeys(self._sharded[m] for m in module.modules() if asked and m in self._sharded)
            for unit in sharded:
                unit.unshard()
                stack.callback(unit.reshard)
            yield flat or bool(sharded)

    def has(self, layer: Any) -> bool:
        """Is a layer in a unit of FSDP1?"""
        return any(m in self._flat for m in _module_of(layer).modules())


def _module_of(layer: Any) -> nn.Module:
    """A view of a layer has that as its `layer`, an experts' parameter its module as `module`."""
    if isinstance(layer, nn.Module):
        return layer
    return layer.layer if hasattr(layer, "layer") else layer.module


def as_declared(module: nn.Module, name: str, view: T) -> T:
    """A parameter as a layer's forward pass sees it, without the gradient that a frozen one is given as a view of the flat
    parameter. Any other tensor comes back as it is."""
    flat: Any = None if view is None else view._base
    if view is None or getattr(flat, "_params", None) is None:
        return view
    own = zip(flat._param_infos, flat._params, strict=True)
    shared = zip(flat._shared_param_infos, flat._shared_params, strict=True)
    for info, parameter in itertools.chain(own, shared):
        if info.module is module and info.param_name == name:
            return view if parameter.requires_grad else view.detach()  # type: ignore[return-value]
    return view
