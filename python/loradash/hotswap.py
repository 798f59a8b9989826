"""Another adapter's file in the active adapter's place: the same tensors with other values, so that nothing is compiled anew."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .checkpoint import AdapterError, adapter_tensors, file_of, fitted, read_adapter, write_tensors
from .config import DashConfig
from .distributed import reshard
from .parked import PARTS
from .state import OwnLayer, dash_state, own_layers
from .units import whole


def hotswap_adapter(model: nn.Module, path: str | os.PathLike) -> nn.Module:
    """Copies an adapter of `save_adapter` into the active adapter's tensors, in place.

    Neither a tensor nor a setting of the layers is another one after it: what torch.compile made stays valid, captured graphs see
    the new values, sharded parameters stay where they are (every process must call this, on the same file). Where the file's
    adapter is smaller it is padded with zeros, which add nothing: make the model's with the largest rank, directions and targets
    that are to come. Its scaling may be another: B is multiplied by the ratio of the two, in float64, and rounded once, which is
    exact where the ratio is a power of two.

    It is for serving: dropout, the launch step and which parameters train stay the model's, and ranks padded with zeros would not
    train. `load_adapter` takes over everything, for equal shapes.

    Returns the model. Raises AdapterError, with the model unchanged: a file that is no adapter or not finite; a rank, directions or
    layers that the model has no place for; trained biases or modules on either side. ValueError for a merged model, whose weights
    have the old one; TypeError for a PEFT model, which has `peft.utils.hotswap` for LoRA alone.
    """
    layers = own_layers(model, "model.load_adapter(path, adapter_name)")
    state = dash_state(model)
    file = file_of(path)
    adapter = read_adapter(file)
    merged = [name for name, layer in layers.items() if layer.merged]
    if merged:
        raise ValueError(f"unmerge(model) before hotswap_adapter; merged: {', '.join(merged[:4])}")
    for config, whose in ((adapter.config, "the file's"), (state.config, "the model's")):
        if config.train_bias or config.trainable_modules is not None:
            raise AdapterError(f"{file}: {whose} adapter has trained biases or modules beside; use load_adapter")
    reshard(model)
    values: dict[str, Tensor] = {}
    for name, layer in layers.items():
        values |= _placed(file, name, layer, adapter.tensors, adapter.config.for_module(name))
    left = adapter.tensors.keys() - {f"{name}.{key}" for name in layers for key in PARTS}
    with whole(model):
        values = fitted(
            file, values | {key: adapter.tensors[key] for key in left}, adapter_tensors(model, state.config)
        )
    write_tensors(model, values)
    state.step = adapter.step
    return model


@torch.no_grad()
def _placed(
    file: Path, name: str, layer: OwnLayer, tensors: dict[str, Tensor], config: DashConfig
) -> dict[str, Tensor]:
    """What a layer's tensors are to be; where the file has none for it, those that add nothing."""
    shapes = layer.shapes(layer.config)
    if f"{name}.lora_b" not in tensors:
        zeros = {key: torch.zeros(shape) for key, shape in shapes.items()}
        zeros["launched"] = torch.zeros((), dtype=torch.bool)
        return {f"{name}.{key}": tensor for key, tensor in zeros.items()}
    placed: dict[str, Tensor] = {}
    for key, shape in shapes.items():
        tensor = tensors.get(f"{name}.{key}")
        # What is missing, larger or of other dimensions does not fit, which is told for all tensors together.
        if tensor is None:
            continue
        if key == "lora_b":
            tensor = (tensor.double() * (config.scaling / layer.scaling)).to(tensor.dtype)
        more = [wanted - found for found, wanted in zip(tensor.shape, shape, strict=False)]
        fits = tensor.dim() == len(shape) and all(n >= 0 for n in more)
        padding = [n for pair in ((0, m) for m in reversed(more)) for n in pair]
        placed[f"{name}.{key}"] = F.pad(tensor, padding) if fits and any(more) else tensor
    return placed
