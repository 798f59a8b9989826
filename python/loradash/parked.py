"""Several adapters of one layer: the active one's tensors are the layer's own, the others wait in a submodule of it.

A parameter stays the same object while it moves between the two places, so that optimizers and schedules go on with theirs. A
layer with one adapter has no such submodule: its state dict and its forward are those of a layer that never heard of others.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from loradash_kernels.rows import Adapter, RowGroups

from .config import DashConfig
from .distributed import gathered
from .merging import TakesUpdate
from .quantised import RequantisationError

DEFAULT = "default"
"""The name of an adapter that was given none."""

PARAMETERS = ("lora_a", "lora_b", "dash_sigma")
BUFFERS = ("dash_u", "dash_vt", "launched")
PARTS = PARAMETERS + BUFFERS
"""An adapter's tensors in a layer; `adapter_shapes` has their shapes."""

PLACE = "parked"
"""The name of the submodule with the adapters that are not active."""


def adapter_shapes(n: int, k: int, config: DashConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of what `DashLinear` adds to a layer (N, K), by name; all are float32 but `launched`, which is bool."""
    r, s = config.r, min(config.directions, n, k)
    return {
        "lora_a": (r, k),
        "lora_b": (n, r),
        "dash_sigma": (s,),
        "dash_u": (n, s),
        "dash_vt": (s, k),
        "launched": (),
    }


def new_parts(module: nn.Module, n: int, k: int, config: DashConfig, device: torch.device) -> None:
    """Registers the tensors of an untrained adapter of a layer (N, K): A drawn, all else zero."""
    for name, shape in adapter_shapes(n, k, config).items():
        dtype = torch.bool if name == "launched" else torch.float32
        tensor = torch.zeros(shape, dtype=dtype, device=device)
        if name in PARAMETERS:
            module.register_parameter(name, nn.Parameter(tensor))
        else:
            module.register_buffer(name, tensor)
    nn.init.kaiming_uniform_(module.lora_a, a=math.sqrt(5))  # type: ignore[arg-type]


class Parked(nn.Module):
    """One adapter of a layer while it is not the active one: its tensors, frozen, and its settings.

    Attributes:
        trains: which of its parameters train while it is active.
    """

    def __init__(self, config: DashConfig) -> None:
        super().__init__()
        self.config = config
        self.trains = dict.fromkeys(PARAMETERS, True)

    def thaw(self, train: bool) -> None:
        """Lets those of its parameters train that do while it is active, or none."""
        for key in PARAMETERS:
            self._parameters[key].requires_grad_(train and self.trains[key])  # type: ignore[union-attr]

    def extra_repr(self) -> str:
        return f"r={self.config.r}, directions={self.config.directions}"


class MixedRows(NamedTuple):
    """A mixed batch: the names of its adapters, by number, and its rows by these."""

    names: tuple[str, ...]
    groups: RowGroups


class HasAdapters(TakesUpdate):
    """The part of `DashLinear` that keeps several adapters.

    Attributes:
        adapter: the name of the adapter that is active in the model, if this layer has it, else None: the layer is then the
            base layer alone.
    """

    adapter: str | None = DEFAULT
    config: Any

    # The mixed batch that is being computed, and what of which adapters is in a merged weight. Class attributes, as most layers
    # never have either.
    _weights: Mapping[str, float] | None = None
    _mixed_rows: MixedRows | None = None

    @property
    def takes_plain_calls(self) -> bool:
        """Does a call compute the active adapter beside the base product, and nothing else? Not while it is merged, disabled,
        without that adapter or in a mixed batch."""
        enabled: bool = self.enabled  # type: ignore[assignment]
        return enabled and self._unmerged is None and self._mixed_rows is None and self.adapter is not None

    def leave_mixed_batch(self, outer: MixedRows | None) -> None:
        """Goes back to the batch around it, or to none: as before there ever was one, which is what compiled code looks at."""
        if outer is None:
            self.__dict__.pop("_mixed_rows", None)
        else:
            self._mixed_rows = outer

    @property
    def adapters(self) -> list[str]:
        """The names of all adapters that this layer has, the active one first."""
        return [*([] if self.adapter is None else [self.adapter]), *self._waiting()]

    def _waiting(self) -> dict[str, Parked]:
        place = self._modules.get(PLACE)
        return {} if place is None else place._modules  # type: ignore[return-value]

    def parked_adapters(self) -> Iterator[tuple[str, Parked]]:
        """The adapters that are not active, by name."""
        yield from self._waiting().items()

    def config_of(self, adapter: str) -> DashConfig:
        """The settings of this layer in an adapter. KeyError for one that it lacks."""
        return self.config if adapter == self.adapter else self._waiting()[adapter].config

    def part(self, adapter: str, key: str) -> Tensor:
        """One of PARTS of an adapter, active or not. Raises AttributeError for one that the layer lacks."""
        holder: nn.Module | None = self if adapter == self.adapter else self._waiting().get(adapter)
        if holder is None:
            raise AttributeError(f"{self._label()} has no adapter {adapter!r}")
        return getattr(holder, key)

    def kernel_adapters(self, rows: MixedRows) -> list[Adapter | None]:
        """What kernels need of the adapters of a mixed batch, by number; None for one without rows, or that the layer lacks."""
        present = set(rows.groups.numbers)
        return [self._kernel_adapter(name) if i in present else None for i, name in enumerate(rows.names)]

    def _kernel_adapter(self, adapter: str) -> Adapter | None:
        if adapter != self.adapter and adapter not in self._waiting():
            return None
        config = self.config_of(adapter)
        a, b, sigma, u, vt = (self.part(adapter, key) for key in PARTS[:5])
        return Adapter(a, b, u, vt, sigma, config.scaling, config.dropout)

    def delta_of(self, adapter: str) -> Tensor:
        """ΔW (N, K) of one adapter, float32: scaling · B A + U diag(Δσ) Vᵀ. Sharded ones are gathered."""
        a, b, sigma, u, vt = (gathered(self.part(adapter, key)).float() for key in PARTS[:5])
        with torch.no_grad(), torch.autocast(a.device.type, enabled=False):
            return self.config_of(adapter).scaling * (b @ a) + (u * sigma) @ vt

    def folded(self, adapter: str) -> tuple[Tensor, Tensor]:
        """A (R, K) and B (N, R) of the whole update of an adapter, float32, R = r + s, the scaling in B; gathered."""
        a, b, sigma, u, vt = (gathered(self.part(adapter, key)).float() for key in PARTS[:5])
        return torch.cat((a, vt)), torch.cat((self.config_of(adapter).scaling * b, u * sigma), 1)

    def delta(self) -> Tensor:
        """ΔW (N, K) in float32 of what is to be merged: the active adapter, a weighted sum of several, or none."""
        if self._weights is None and self.adapter is not None:
            return super().delta()
        total = torch.zeros(self.out_features, self.in_features, device=self.weight.device)  # type: ignore[call-overload]
        for adapter, weight in (self._weights or {}).items():
            if adapter in self.adapters:
                total += weight * self.delta_of(adapter).to(total.device)
        return total

    def merge(
        self, requantise: bool = False, part: Tensor | None = None, adapters: Mapping[str, float] | None = None
    ) -> RequantisationError | None:
        """As `TakesUpdate.merge`; with adapters, name -> factor, the sum of their updates instead of the active one's.

        Those that the layer lacks add nothing. A layer with none of them is merged all the same, so that the active one, which
        was not asked for, does not add its terms.
        """
        if self._mixed_rows is not None:
            raise ValueError(f"{self._label()} is in a mixed batch; merge after its block")
        if self._unmerged is None and adapters is not None:
            self._weights = adapters
        try:
            return super().merge(requantise, part)
        finally:
            if self._unmerged is None:
                self._forget_weights()

    def unmerge(self) -> None:
        super().unmerge()
        self._forget_weights()

    def _forget_weights(self) -> None:
        # As before there ever were any: a layer that was patched is given back with the attributes that it had.
        self.__dict__.pop("_weights", None)

    def park_new(self, adapter: str, config: DashConfig, device: torch.device) -> None:
        """An untrained adapter, which is not active."""
        parked = Parked(config)
        new_parts(parked, self.out_features, self.in_features, config, device)  # type: ignore[arg-type]
        self._park(adapter, parked)

    def _park(self, adapter: str, parked: Parked) -> None:
        parked.thaw(False)
        parked.train(self.training)
        # A base layer that is kept whole answers for what is not ours: the submodule is put where it belongs.
        self._modules.setdefault(PLACE, nn.Module())._modules[adapter] = parked  # type: ignore[union-attr]

    def activate(self, adapter: str) -> None:
        """Makes an adapter the layer's own, and parks the one that was. A layer that lacks it is the base layer alone."""
        if adapter == self.adapter:
            return
        if self.adapter is not None:
            parked = Parked(self.config)
            parked.trains = {key: self._parameters[key].requires_grad for key in PARAMETERS}  # type: ignore[union-attr]
            _move(self, parked)
            self._park(self.adapter, parked)
        self.adapter, self.config = None, None
        waiting = self._waiting().get(adapter)
        if waiting is not None:
            waiting.thaw(True)
            _move(waiting, self)
            self.adapter, self.config = adapter, waiting.config
            self.remove_parked(adapter)

    def remove_parked(self, adapter: str) -> None:
        """Forgets an adapter that is not active."""
        place = self._modules[PLACE]
        del place._modules[adapter]  # type: ignore[union-attr]
        if not place._modules:  # type: ignore[union-attr]
            del self._modules[PLACE]

    def _load_from_state_dict(self, state_dict: dict, prefix: str, local_metadata: dict, *args: Any) -> None:
        """Raises ValueError for a state dict in which another adapter is active: its tensors would land in the wrong one."""
        place = f"{prefix}{PLACE}."
        theirs = {key.removeprefix(place).split(".")[0] for key in state_dict if key.startswith(place)}
        if self.adapter in theirs:
            raise ValueError(
                f"{self._label()}: in the state dict the adapter {self.adapter!r} is not the active one, and here it is: "
                "set_adapter(model, name) with the name that was active when it was saved"
            )
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)


def watch_backward(layer: HasAdapters, rows: MixedRows, y: Tensor) -> Tensor:
    """y, the layer's output in a mixed batch, whose backward pass must come before the batch is over.

    A checkpoint computes its part of the model again in the backward pass, and outside of the block that would be with the
    active adapter alone. Raises RuntimeError for a reentrant checkpoint, which hides from autograd; in the backward pass where it
    comes too late.
    """
    if torch.compiler.is_compiling():
        return y
    if layer.training and not torch.is_grad_enabled() and _is_in_reentrant_checkpoint():
        raise RuntimeError("a mixed batch cannot be checkpointed with use_reentrant=True: pass use_reentrant=False")
    if y.requires_grad:
        y.register_hook(functools.partial(_check_block, layer, rows))
    return y


def _check_block(layer: HasAdapters, rows: MixedRows, gradient: Tensor) -> None:
    if layer._mixed_rows is not rows:
        raise RuntimeError(
            "the backward pass of a mixed batch belongs into its block, as checkpoints compute the forward pass again there: "
            "with mixed_batch(model, names): model(x).sum().backward()"
        )


def _is_in_reentrant_checkpoint() -> bool:
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code is torch.utils.checkpoint.CheckpointFunction.forward.__code__:
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def _move(source: nn.Module, target: nn.Module) -> None:
    for key in PARAMETERS:
        target._parameters[key] = source._parameters.pop(key)
    for key in BUFFERS:
        target._buffers[key] = source._buffers.pop(key)
        source._non_persistent_buffers_set.discard(key)
