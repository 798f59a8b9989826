"""The end of the pre-launch phase: finds the task-specific directions of every layer and launches them."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from loradash_kernels import Directions, task_specific_directions

from .inject import dash_layers, dash_state
from .linear import DashLinear

BATCH_ELEMENTS = 2**26
"""Weights decomposed at a time: 256 MB in float32."""


@dataclass(frozen=True)
class LayerReport:
    """What pre-launch found for one layer: the route of its SVD, and rate, sigma and index (s,), highest rate first."""

    name: str
    route: str
    rate: Tensor
    sigma: Tensor
    index: Tensor


def prelaunch(model: nn.Module, progress: bool = True) -> list[LayerReport]:
    """Chooses every layer's directions by change rate (paper, section 4) and starts the dash phase.

    Layers of one shape are decomposed together, with the method `config.svd`. Nothing is written before all are found: a
    failure leaves the model in pre-launch. Layers whose ΔW is still zero (unused ones) stay plain LoRA, with a warning.
    Under torch.distributed every process ends with the directions of rank 0.

    Raises ValueError for a model without adapters, weights that are not finite, or merged layers.
    """
    method = dash_state(model).config.svd
    layers = dash_layers(model)
    merged = [name for name, layer in layers.items() if layer.merged]
    if merged:
        raise ValueError(f"unmerge(model) before prelaunch; merged: {', '.join(merged[:4])}")
    idle = [name for name, layer in layers.items() if not bool(layer.lora_b.any()) or not bool(layer.lora_a.any())]
    if idle:
        warnings.warn(
            f"loradash: no update yet in {len(idle)} layers, they stay plain LoRA: {', '.join(idle[:4])}", stacklevel=2
        )
    names = [name for name, layer in layers.items() if name not in set(idle) and layer.dash_sigma.numel()]

    found: dict[str, tuple[Directions, str]] = {}
    with tqdm(total=len(names), desc="pre-launch", unit="layer", disable=not progress) as bar:
        for batch in _batches(names, layers):
            group = [layers[name] for name in batch]
            directions = _directions(group, method)
            for i, name in enumerate(batch):
                u, vt, sigma, rate, index = (t[i] for t in directions[:5])
                one = Directions(u, vt, sigma, rate, index, directions.routes[i : i + 1])
                found[name] = (one, directions.routes[i])
            bar.update(len(batch))
    for name in names:
        layers[name].launch(found[name][0])
    _broadcast([layers[name] for name in names])
    return [LayerReport(n, route, d.rate, d.sigma, d.index) for n, (d, route) in found.items()]


def _batches(names: list[str], layers: dict[str, DashLinear]) -> list[list[str]]:
    """Layers of one shape, rank and device together, in batches of bounded size."""
    groups: dict[tuple, list[str]] = {}
    for name in names:
        layer = layers[name]
        key = (
            layer.weight_nk().shape,
            layer.lora_a.shape,
            layer.dash_sigma.numel(),
            layer.scaling,
            layer.weight.device,
        )
        groups.setdefault(key, []).append(name)
    batches = []
    for members in groups.values():
        size = max(1, BATCH_ELEMENTS // max(1, layers[members[0]].weight.numel()))
        batches += [members[i : i + size] for i in range(0, len(members), size)]
    return batches


@torch.no_grad()
def _directions(group: list[DashLinear], method: str) -> Directions:
    weight = torch.stack([layer.weight_nk().float() for layer in group])
    lora_a, lora_b = (torch.stack([getattr(layer, n).float() for layer in group]) for n in ("lora_a", "lora_b"))
    s = group[0].dash_sigma.numel()
    return task_specific_directions(weight, lora_a, lora_b, s, scaling=group[0].scaling, method=method)


def _broadcast(layers: list[DashLinear]) -> None:
    dist = torch.distributed
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return
    for layer in layers:
        for tensor in (layer.dash_u, layer.dash_vt):
            dist.broadcast(tensor, src=0)
