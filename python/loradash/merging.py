"""A linear layer's weight, and how ΔW is taken into it and out again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from . import zero
from .base_layers import is_transposed
from .config import DashConfig
from .distributed import assign, gathered, is_sharded
from .formats import keeping_codes, moved
from .quantised import RequantisationError, can_take_update, is_quantised, requantise, restore, weight_of
from .slices import LinearSlice

Self = TypeVar("Self", bound="TakesUpdate")


class TakesUpdate(nn.Module):
    """The part of `DashLinear` that merges; the tensors are described there.

    `_unmerged` is the weight before `merge`, or the attributes of the base layer that `requantise` replaced.
    """

    config: DashConfig
    name: str
    transposed: bool
    weight: Tensor
    base: nn.Module | None
    lora_a: Tensor
    lora_b: Tensor
    dash_sigma: Tensor
    dash_u: Tensor
    dash_vt: Tensor
    _unmerged: Tensor | dict[str, Any] | None

    @property
    def scaling(self) -> float:
        return self.config.scaling

    @property
    def merged(self) -> bool:
        return self._unmerged is not None

    def weight_nk(self) -> Tensor:
        """The weight as (N, K): a view; for a layer that computes in a way of its own, a new tensor with every call."""
        if self.base is not None:
            return weight_of(self.base)
        # Somebody may have quantised the weight since `apply_dash`.
        weight = self.weight.dequantize() if is_quantised(self.weight) else self.weight
        return self.oriented(weight)

    def oriented(self, weight: Tensor) -> Tensor:
        """A tensor of the stored weight's shape as (N, K)."""
        return weight.t() if self.transposed else weight

    def _label(self) -> str:
        return self.name or type(self).__name__

    @torch.no_grad()
    def delta(self) -> Tensor:
        """ΔW (N, K) in float32: scaling · B A + U diag(Δσ) Vᵀ. Sharded adapters are gathered: every process must call this."""
        a, b, u, vt, sigma = map(gathered, (self.lora_a, self.lora_b, self.dash_u, self.dash_vt, self.dash_sigma))
        with torch.autocast(a.device.type, enabled=False):
            return self.scaling * (b.float() @ a.float()) + (u.float() * sigma.float()) @ vt.float()

    def _holder(self) -> nn.Module:
        """The module whose weight can take ΔW. Raises ValueError where there is none."""
        holder = self if self.base is None else self.base
        weight = holder.weight
        if weight.is_meta:
            raise ValueError(
                f"{self._label()}: its weight is on meta (offloaded, or not loaded yet) and cannot be merged"
            )
        if self.base is not None and is_sharded(weight):  # type: ignore[arg-type]
            raise ValueError(
                f"{self._label()}: {type(holder).__name__} is kept whole, and sharded (DTensor), and cannot take the update: "
                "save_adapter(model, path) in every process, then merge(load_adapter(plain_model, path))"
            )
        # A layer parametrized or pruned since it was adapted computes its weight.
        computed = "weight" not in holder._parameters and not isinstance(holder, LinearSlice)
        if computed or is_quantised(weight) or (self.base is not None and not can_take_update(self.base)):
            quantised = is_quantised(weight)
            kind = "is quantised" if quantised else "computes in a way of its own"
            way = "merge with requantise=True, which rounds W + ΔW anew, or " if quantised else ""
            raise ValueError(
                f"{self._label()}: {type(holder).__name__} {kind} and cannot take the update; {way}serve it beside the model: "
                "export_lora(model, path)"
            )
        return holder

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """W + ΔW in the stored weight's shape and dtype, rounded once; sharded parameters are gathered.

        Raises ValueError where the weight has no room for ΔW: quantised layers, layers whose products are others than
        those with their weight, weights on meta, values that overflow the weight's dtype.
        """
        weight = gathered(self._holder().weight)  # type: ignore[arg-type]
        delta = self.delta()
        delta = delta.t() if self.transposed or (self.base is not None and is_transposed(self.base)) else delta
        # That of a convolution has dimensions of size one besides.
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32)) + delta.reshape(weight.shape)
        merged = wide.to(weight.dtype)
        if not bool(merged.isfinite().all()) and bool(weight.isfinite().all()):
            raise ValueError(
                f"{self._label()}: the merged weight reaches {wide.abs().max():.3g}, which is not finite in {weight.dtype}"
            )
        return merged

    @torch.no_grad()
    def merge(self, requantise: bool = False, part: Tensor | None = None) -> RequantisationError | None:
        """Adds ΔW to the weight, as a new tensor: weights tied to this one stay as they are. Again: no effect.

        A sharded weight is written in place, beside a copy of this process's part. Raises ValueError as `merged_weight`,
        with the layer unchanged.

        Args:
            requantise: W + ΔW of a quantised layer is quantised anew in its own format, instead of refused.
            part: a copy of this process's part of a weight that FSDP1 has gathered and will take back: it is written in place.

        Returns the error that quantising W + ΔW made, or None where nothing was quantised.
        """
        if self._unmerged is not None:
            return None
        if requantise and self.base is not None and is_quantised(self.base.weight):
            return self._requantise(self.base)
        merged, holder = self.merged_weight(), self._holder()
        weight: Tensor = holder.weight  # type: ignore[assignment]
        if is_sharded(weight):
            self._keep(zero.own_part(weight) if zero.is_partitioned(weight) else weight.detach().clone())
            # One process's values for all, where machines round differently.
            assign(weight, merged, source=0)
        elif isinstance(holder, LinearSlice):
            if part is not None:
                raise ValueError(
                    f"{self._label()} is a part of a weight that FSDP1 has, and cannot be merged there: save_adapter(model, path) "
                    "in every process, then merge(load_adapter(plain_model, path))"
                )
            self._keep(holder.take(merged))
        elif part is not None:
            self._keep(part)
            weight.copy_(merged)
        else:
            holder.weight = nn.Parameter(merged, requires_grad=False)
            self._keep(weight)
        return None

    def _requantise(self, base: nn.Module) -> RequantisationError:
        try:
            before, error = requantise(base, self.delta())
        except ValueError as refusal:
            raise ValueError(
                f"{self._label()}: {refusal}; serve the update beside the model: export_lora(model, path)"
            ) from refusal
        self._keep(before)
        return error

    @torch.no_grad()
    def unmerge(self) -> None:
        """Puts the original weight back, bit for bit. Without `merge`: no effect."""
        if self._unmerged is None:
            return
        original, holder = self._unmerged, self if self.base is None else self.base
        if zero.is_partitioned(holder.weight):  # type: ignore[arg-type]
            zero.put_back(holder.weight, cast(Tensor, original))
            self._keep(None)
            return
        if isinstance(holder, LinearSlice):
            holder.give_back(cast(Tensor, original))
            self._keep(None)
            return
        if isinstance(original, Tensor) and not isinstance(original, nn.Parameter):
            if holder.weight.shape != original.shape:
                raise ValueError(
                    f"{self._label()}: FSDP1 holds its weight whole; unmerge outside of summon_full_params"
                )
            holder.weight.copy_(original)  # type: ignore[operator]
            self._keep(None)
            return
        self._keep(None)
        if isinstance(original, dict):
            restore(holder, original)
        else:
            holder.weight = cast(nn.Parameter, original)

    def _keep(self, weight: Tensor | dict[str, Any] | None) -> None:
        """Notes the weight before `merge` outside the module's parameters, so that its state dict has no part of it."""
        object.__setattr__(self, "_unmerged", weight)

    def _apply(self: Self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """`to`, `half`, `cuda`: the weight before `merge` goes along, and codes stay codes."""
        fn = keeping_codes(fn)
        super()._apply(fn, recurse)
        if isinstance(self._unmerged, dict):
            self._keep(moved(self._unmerged, fn))
        elif self._unmerged is not None:
            self._unmerged.data = fn(self._unmerged.data)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        self.note_merged(destination, prefix)

    def note_merged(self, destination: Any, prefix: str) -> None:
        """Tells in a state dict's metadata that this layer's weight has the update."""
        if self.merged and hasattr(destination, "_metadata"):
            destination._metadata[prefix[:-1]]["merged"] = True

    def refuse_merged(self, prefix: str, state_dict: dict, local_metadata: dict) -> None:
        """Raises ValueError where the layer is merged, and for the state dict of a merged one that has its adapter too."""
        if self.merged and any(key.startswith(prefix) for key in state_dict):
            raise ValueError(f"{self._label()} is merged; unmerge(model) before load_state_dict")
        has_adapter = any(key.startswith((f"{prefix}lora_b", f"{prefix}lora_B")) for key in state_dict)
        if local_metadata.get("merged") and has_adapter:
            raise ValueError(
                f"{self._label()}: the state dict is that of a merged model, whose adapters would count twice here; "
                "unmerge(model) before state_dict"
            )

    def _load_from_state_dict(self, state_dict: dict, prefix: str, local_metadata: dict, *args: Any) -> None:
        self.refuse_merged(prefix, state_dict, local_metadata)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)
