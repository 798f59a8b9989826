"""Several adapters as one: the sum of their updates, each times a factor, as one more adapter of the model."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .adapters import add_adapter, linear_layers
from .config import DashConfig
from .linear import DashLinear
from .model import check_factors


@torch.no_grad()
def merge_adapters(model: nn.Module, factors: Mapping[str, float], name: str) -> nn.Module:
    """Adds an adapter whose ΔW is the sum of factor · ΔW over others, in every layer, to the rounding of float32.

        merge_adapters(model, {"english": 0.7, "french": 0.3}, name="both")
        set_adapter(model, "both")

    The factors of low rank are put side by side: A = [A₁; V₁ᵀ; A₂; V₂ᵀ; ...], B = [f₁ scaling₁ B₁ | f₁ U₁ diag(Δσ₁) | ...], so its
    rank is the sum of r + s, without a decomposition and without an error. All layers get the largest such rank, short ones
    zeros. It is a plain LoRA (directions=0, scaling 1, no dropout): saved, exported, mixed and merged as any other, and trained
    from where it is. It has the layers that any of the others has, and is parked. `merge(model, adapters=factors)` puts the same
    sum into the weights.

    Args:
        factors: name -> finite factor, of adapters of the model at whatever phase; of any sign.
        name: of the new one.

    Returns the model. Raises ValueError, with the model unchanged, as `add_adapter`, for a name that the model lacks, and for sums
    that are not finite; TypeError for a PEFT model, which has `add_weighted_adapter`.
    """
    layers = linear_layers(model, "model.add_weighted_adapter(adapters, weights, name)")
    factors = check_factors(model, factors)
    stacked = {
        n: _stacked(layer, factors) for n, layer in layers.items() if not factors.keys().isdisjoint(layer.adapters)
    }
    spoiled = [n for n, parts in stacked.items() if not all(bool(t.isfinite().all()) for t in parts)]
    if spoiled:
        raise ValueError(f"the sum of {', '.join(factors)} is not finite in float32: {', '.join(spoiled[:4])}")
    rank = max(a.shape[0] for a, _ in stacked.values())
    targets = "|".join(map(re.escape, stacked))
    config = DashConfig(r=rank, alpha=rank, directions=0, prelaunch_steps=0, target_modules=targets)
    add_adapter(model, name, config)
    for layer_name, (a, b) in stacked.items():
        more = rank - a.shape[0]
        layers[layer_name].part(name, "lora_a").copy_(F.pad(a, (0, 0, 0, more)))
        layers[layer_name].part(name, "lora_b").copy_(F.pad(b, (0, more)))
    return model


def _stacked(layer: DashLinear, factors: Mapping[str, float]) -> tuple[Tensor, Tensor]:
    """A (R, K) and B (N, R) of the sum."""
    folded = [(factor, *layer.folded(adapter)) for adapter, factor in factors.items() if adapter in layer.adapters]
    return torch.cat([a for _, a, _ in folded]), torch.cat([factor * b for factor, _, b in folded], 1)
