"""Merging LORADASH adapters into base layers that compute in a way of their own.

PEFT adds ΔW to such a layer's weight, whatever the layer does with it, and what it takes out of a quantised one again is
rounded once more (an NF4 base is off by 8% of its norm after merge and unmerge). Here such a layer takes the update only
where its products are those with its weight, or is quantised anew, with the error stated, and gets its own codes back.

A plain base layer stays PEFT's: `unmerge` subtracts what `merge` added, in the weight's dtype, so that a part of the elements
of a 16-bit weight is a last digit off after it, and more with every round. Having them back exactly would take a copy of every
adapted weight while they are merged, which is what merging is done to save; a run that merges and unmerges often (to sample
from the model while it trains) keeps the base in float32, or leaves the adapter beside it.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from loradash.distributed import is_sharded
from loradash.formats import keeping_codes, moved
from loradash.quantised import (
    RequantisationError,
    can_take_update,
    is_quantised,
    requantise,
    requantise_refusal,
    restore,
)


class Mergeable(nn.Module):
    """The part of a LORADASH layer that looks after `merge` and `unmerge`; all that a plain base layer needs is PEFT's."""

    requantisation: RequantisationError | None = None
    """What quantising W + ΔW anew made, while it is merged."""

    _replaced: dict[str, Any] | None = None
    """Attributes of the base layer that the first merge replaced."""

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """PEFT's. Raises ValueError, with the layer unchanged, where the base layer cannot take an update."""
        layer: Any = self
        base = layer.get_base_layer()
        reason = merge_refusal(base)
        if reason is not None:
            raise ValueError(reason)
        if not is_quantised(base.weight):
            super().merge(safe_merge=safe_merge, adapter_names=adapter_names)  # type: ignore[misc]
            return
        names = [name for name in check_adapters_to_merge(layer, adapter_names) if name in layer.lora_A]
        if names:
            self._requantise(base, names)

    @torch.no_grad()
    def _requantise(self, base: nn.Module, names: Sequence[str]) -> None:
        layer: Any = self
        delta: Tensor = sum(_product(*layer.folded(name)) for name in names)  # type: ignore[assignment]
        bias = sum(layer.lora_B[name].bias * layer.scaling[name] for name in names if layer.lora_bias[name])
        if isinstance(bias, Tensor) and base.bias is None:
            raise ValueError("the base layer has no bias, which the one of lora_B (lora_bias=True) could go into")
        before, self.requantisation = requantise(base, delta)
        if isinstance(bias, Tensor):
            old: Any = base.bias
            before["bias"] = old
            base.bias = nn.Parameter((old + bias).to(old.dtype), requires_grad=False)
        self._replaced = before | (self._replaced or {})
        layer.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """PEFT's; a quantised base layer gets its own codes back, bit for bit."""
        layer: Any = self
        if self._replaced is None:
            super().unmerge()  # type: ignore[misc]
            return
        restore(layer.get_base_layer(), self._replaced)
        self._replaced = self.requantisation = None
        layer.merged_adapters.clear()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        fn = keeping_codes(fn)
        super()._apply(fn, recurse)
        if self._replaced is not None:
            self._replaced = moved(self._replaced, fn)
        return self


def merge_refusal(base: nn.Module) -> str | None:
    """Why a base layer cannot take an update, or None."""
    weight: Any = base.weight
    way = "; serve the adapter beside the model, as it is or by export_lora(model, path)"
    if is_quantised(weight):
        reason = requantise_refusal(base)
        return None if reason is None else f"{type(base).__name__}: {reason}{way}"
    # Accelerate's hook brings weights to where they are used; what it calls is the class's forward.
    patched = "forward" in vars(base) and "_hf_hook" not in vars(base)
    plain = type(base).forward is nn.Linear.forward and not patched and "weight" in base._parameters
    if plain or is_sharded(weight) or can_take_update(base):
        return None
    return f"{type(base).__name__} computes in a way of its own and cannot take an update{way}"


@contextlib.contextmanager
def checked_merge(layers: dict[str, Any]) -> Iterator[None]:
    """Within the block PEFT merges layers, given by name. What quantising some anew made of them is told after it.

    Raises ValueError, naming a layer that cannot be merged, before any is.
    """
    for name, layer in layers.items():
        reason = merge_refusal(layer.get_base_layer())
        if reason is not None:
            raise ValueError(f"{name}: {reason}")
    yield
    errors = {name: layer.requantisation for name, layer in layers.items() if layer.requantisation is not None}
    if errors:
        worst = max(errors, key=lambda name: errors[name].of_update)
        warnings.warn(
            f"loradash: {len(errors)} quantised layers were quantised anew with their update; the error is up to "
            f"{max(e.of_weight for e in errors.values()):.2g} of the norm of W + ΔW, and {errors[worst].of_update:.2g} of that of "
            f"ΔW ({worst})",
            stacklevel=4,
        )


def _product(a: Tensor, b: Tensor) -> Tensor:
    with torch.autocast(a.device.type, enabled=False):
        return b @ a
