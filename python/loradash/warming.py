"""Runs every adapted layer once before training does: kernels are compiled, tuned and loaded, weights are packed."""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from tqdm.auto import tqdm

from .distributed import is_sharded
from .linear import DashLinear
from .state import experts_of, linears_of, own_layers


@dataclass(frozen=True)
class WarmedUp:
    """One layer that ran with one number of rows: x (rows, K) of a dtype on a device; forward and, where it trains, backward.

    layers: how many of the model's layers are like this one. seconds: what it took this first time.
    """

    name: str
    rows: int
    out_features: int
    in_features: int
    dtype: torch.dtype
    device: torch.device
    passes: tuple[str, ...]
    layers: int
    seconds: float


def warm_up(
    model: nn.Module, rows: Iterable[int], dtype: torch.dtype | None = None, progress: bool = True
) -> list[WarmedUp]:
    """Runs a layer of every kind that the model has, with every number of rows, forward and, where it trains, backward.

    What a first call costs is paid here and not in the first steps: JIT compilation, tuning (LORADASH_TUNE=1), and on a CPU
    the packing of weights, for which every layer runs once. To be called before a CUDA graph is captured, inside of which
    nothing can be compiled; on the device and in the mode (`model.train()`, `torch.autocast`) that is to follow. Parameters,
    gradients, buffers, the mode and the state of the random number generators stay as they are; no hook on parameters is
    called. A model that torch.compile is to run is warmed up by a step of its own, and so are experts' parameters, whose rows the
    router decides: they are left out, with a warning.

    Args:
        rows: tokens of a step, batch times length; a number that varies wants each value, or its powers of two.
        dtype: of the activations of quantised layers, whose weights do not tell; by default PyTorch's.

    Returns what was run. Raises ValueError for a model without adapters, rows that are no positive integers, parameters that
    are sharded or on meta; RuntimeError inside of a graph capture, and with the layer's name where a layer fails.
    """
    counts = list(dict.fromkeys(rows))
    if not counts or any(type(count) is not int or count < 1 for count in counts):
        raise ValueError(f"rows must be positive integers, at least one, got {counts}")
    adapted = own_layers(model, "it with a batch: layers of PEFT's are warmed up by a step")
    if not adapted:
        raise ValueError("the model has no LoRA-Dash adapters; call apply_dash(model, config) first")
    layers, left_out = linears_of(adapted), experts_of(adapted)
    if left_out:
        warnings.warn(
            f"loradash: warm_up leaves out {len(left_out)} experts' parameters, whose rows the router decides: warm them up by "
            "a step",
            stacklevel=2,
        )
    _check(layers)
    runs = _planned(layers, counts, dtype)
    cards = sorted({layer.lora_a.device for layer in layers.values() if layer.lora_a.is_cuda}, key=str)
    with torch.random.fork_rng(cards), tqdm(total=len(runs), desc="warm-up", unit="run", disable=not progress) as bar:
        done = []
        for name, count, alike in runs:
            bar.set_postfix_str(f"{name}, {count} rows")
            done.append(_run(name, layers[name], count, dtype, alike))
            bar.update()
    return done


def _check(layers: dict[str, DashLinear]) -> None:
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "warm_up comes before a CUDA graph is captured: nothing can be compiled or measured in a capture"
        )
    for text, names in (
        ("warm_up comes before fully_shard; sharded", [n for n, m in layers.items() if any(map(is_sharded, _own(m)))]),
        ("warm_up needs the weights; on meta", [n for n, m in layers.items() if m.lora_a.is_meta]),
    ):
        if names:
            raise ValueError(f"{text}: {', '.join(names[:4])}")


def _own(layer: DashLinear) -> list[nn.Parameter]:
    return [p for p in layer._parameters.values() if p is not None]


def _planned(
    layers: dict[str, DashLinear], counts: Sequence[int], dtype: torch.dtype | None
) -> list[tuple[str, int, int]]:
    """(layer, rows, layers alike) of every run: one layer of a kind, and on a CPU, for its packed weight, each one once."""
    kinds: dict[tuple, list[str]] = {}
    for name, layer in layers.items():
        kinds.setdefault(_kind(layer, dtype), []).append(name)
    runs = []
    for names in kinds.values():
        runs += [(names[0], count, len(names)) for count in counts]
        if layers[names[0]].lora_a.device.type == "cpu":
            runs += [(name, max(counts), len(names)) for name in names[1:]]
    return runs


def _kind(layer: DashLinear, dtype: torch.dtype | None) -> tuple:
    """Layers for which the same kernels run."""
    tensors = [(t.shape, t.stride(), t.dtype, t.device, t.requires_grad) for t in _own(layer)]
    config = layer.config
    settings = config.dropout, config.scaling, layer.training, layer.enabled, layer.merged, layer.transposed
    return type(layer.base), layer.dash_u.shape, _activations(layer, dtype), *settings, *tensors


def _activations(layer: DashLinear, dtype: torch.dtype | None) -> torch.dtype:
    """The dtype of x: the weight's, where that is one to compute in."""
    own = layer.weight.dtype
    return own if own.is_floating_point and own.itemsize > 1 else dtype or torch.get_default_dtype()


def _run(name: str, layer: DashLinear, rows: int, dtype: torch.dtype | None, alike: int) -> WarmedUp:
    device, start = layer.lora_a.device, time.perf_counter()
    try:
        # Only what is seen a second time in the same pass is packed.
        for _ in range(2 if device.type == "cpu" else 1):
            passes = _passes(_twin(layer), rows, _activations(layer, dtype))
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except Exception as error:
        raise RuntimeError(f"warm_up: {name} fails with {rows} rows: {type(error).__name__}: {error}") from error
    seconds, used = time.perf_counter() - start, _activations(layer, dtype)
    return WarmedUp(name, rows, layer.out_features, layer.in_features, used, device, passes, alike, seconds)


def _passes(twin: DashLinear, rows: int, dtype: torch.dtype) -> tuple[str, ...]:
    """Runs a layer, and its backward pass towards x and all that trains. Returns what was run."""
    x = torch.randn(rows, twin.in_features, device=twin.lora_a.device).to(dtype)
    leaves = [p for p in twin._parameters.values() if p is not None and p.requires_grad]
    if not (twin.training and leaves and torch.is_grad_enabled()):
        twin.forward(x)
        return ("forward",)
    y = twin.forward(x.requires_grad_())
    # Where the layer is merged or disabled, nothing but x has a gradient.
    torch.autograd.grad(y, [x, *leaves], torch.ones_like(y), allow_unused=True)
    return ("forward", "backward")


def _twin(layer: DashLinear) -> DashLinear:
    """The same layer with the same tensors, whose gradients and hooks are its own."""
    twin = copy.copy(layer)
    own: dict[str, nn.Parameter | None] = dict(layer._parameters)
    for name, parameter in own.items():
        # A frozen weight stays the tensor that it is, which its packed copies are found by.
        if parameter is not None and parameter.requires_grad:
            own[name] = nn.Parameter(parameter.detach())
    twin.__dict__["_parameters"] = own
    return twin
