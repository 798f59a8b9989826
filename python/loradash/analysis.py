"""What the paper looks at: change rates of a trained adapter's layers, and how directions of several adapters agree."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm.auto import tqdm

from loradash_kernels import change_rates, direction_accuracy, direction_recall

from .base_layers import PLAIN
from .checkpoint import FILE_NAME, AdapterError, read_safetensors
from .config import DashConfig
from .peft_layout import PREFIX

Factors = dict[str, tuple[Tensor, Tensor, float]]
"""By layer: A (r, K), B (N, r), scaling."""


class Weights:
    """The matrices of a model on disk: a .safetensors file, or a folder of them. Read one at a time."""

    def __init__(self, path: Path) -> None:
        files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
        self._file: dict[str, Path] = {}
        self._shape: dict[str, list[int]] = {}
        names: list[str] = []
        for file in files:
            try:
                with safe_open(str(file), framework="pt") as opened:
                    for name in opened.keys():  # noqa: SIM118
                        names.append(name)
                        shape = opened.get_slice(name).get_shape()
                        if len(shape) == 2:
                            self._file[name], self._shape[name] = file, shape
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{file}: cannot be read as safetensors: {error}") from error
        if not self._file:
            raise ValueError(f"{path}: no matrices; wanted a .safetensors file or a folder of them")
        # What bitsandbytes needs to read its codes of four bits, which may lie in a floating dtype.
        self._codes = {name.rpartition(".quant_state.")[0] for name in names}

    def names(self) -> list[str]:
        return list(self._file)

    def load(self, name: str) -> Tensor:
        """A matrix by its name in the file. ValueError for what cannot be read, and for codes of a quantised weight."""
        try:
            with safe_open(str(self._file[name]), framework="pt") as opened:
                matrix = opened.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{self._file[name]}: {name} cannot be read: {error}") from error
        if name in self._codes or matrix.dtype not in PLAIN:
            raise ValueError(
                f"{self._file[name]}: {name} holds the codes of a quantised weight ({matrix.dtype}), not its numbers; load the "
                "model, adapt it and decompose by SpectralCache().start(model).wait()"
            )
        return matrix

    def shape(self, name: str) -> tuple[int, int]:
        rows, columns = self._shape[name]
        return rows, columns

    def of_layer(self, layer: str) -> str:
        """The name of a layer's weight, which may begin with more than the layer's. ValueError where it is not clear."""
        wanted = f"{layer}.weight"
        found = [n for n in self._file if n == wanted or n.endswith("." + wanted) or wanted.endswith("." + n)]
        if len(found) != 1:
            raise ValueError(f"the model has {len(found)} weights for layer {layer}: {', '.join(found[:4]) or 'none'}")
        return found[0]


def load_factors(path: Path) -> Factors:
    """A and B of every layer of an adapter: one of ours, or a LoRA in PEFT's format. AdapterError for anything else."""
    ours = path if path.suffix == ".safetensors" else path / FILE_NAME
    theirs = path / "adapter_model.safetensors"
    file = ours if ours.is_file() else theirs
    try:
        header, tensors = read_safetensors(file)
        if "loradash" in header:
            factors = _our_factors(tensors, json.loads(header["loradash"])["config"])
        else:
            factors = _peft_factors(tensors, json.loads((file.parent / "adapter_config.json").read_text()))
        if not factors:
            raise ValueError("it has no LoRA layers")
        return factors
    # Whatever the readers of the format or of JSON raise, the file is at fault.
    except Exception as error:
        raise AdapterError(f"{path}: cannot be read as a LoRA-Dash or PEFT LoRA adapter: {error}") from error


def _our_factors(tensors: dict[str, Tensor], settings: dict[str, Any]) -> Factors:
    config = DashConfig.from_dict(settings)
    names = [key.removesuffix(".lora_a") for key in tensors if key.endswith(".lora_a")]
    return {n: (tensors[f"{n}.lora_a"], tensors[f"{n}.lora_b"], config.for_module(n).scaling) for n in names}


def _peft_factors(tensors: dict[str, Tensor], settings: dict[str, Any]) -> Factors:
    """Rank and alpha of a layer are those of the first pattern that matches the end of its name, as PEFT reads them."""
    factors = {}
    for key in tensors:
        if not key.endswith(".lora_A.weight"):
            continue
        stem = key.removesuffix(".lora_A.weight")
        name = stem.removeprefix(PREFIX)
        a, b = tensors[key], tensors[f"{stem}.lora_B.weight"]
        r = _by_pattern(settings.get("rank_pattern"), name, settings["r"])
        alpha = _by_pattern(settings.get("alpha_pattern"), name, settings["lora_alpha"])
        if a.shape[0] != r:
            raise ValueError(f"{name} has rank {a.shape[0]}, its settings say {r}")
        factors[name] = a, b, alpha / (r**0.5 if settings.get("use_rslora") else r)
    return factors


def _by_pattern(patterns: dict[str, Any] | None, name: str, default: Any) -> Any:
    found = (value for pattern, value in (patterns or {}).items() if re.match(rf"(.*\.)?({pattern})$", name))
    return next(found, default)


@dataclass(frozen=True)
class LayerRates:
    """Change rates (n,) of one layer, largest σ first, and σ (n,)."""

    rate: Tensor
    sigma: Tensor

    def top(self, count: int) -> Tensor:
        """Indices of the highest rates, highest first."""
        return self.rate.topk(min(count, self.rate.numel())).indices


def layer_rates(
    weights: Weights, factors: Factors, progress: bool = True, device: torch.device | str = "cpu"
) -> dict[str, LayerRates]:
    """All change rates of every layer that was trained (B is not zero), by the exact route on a device; results on the CPU.

    transformers' Conv1D stores weights as (K, N). A square one tells nothing: it counts as the rectangular ones do where
    these are all stored so. Raises ValueError, with the layer's name, for weights that are missing or do not fit.
    """
    trained = {n: f for n, f in factors.items() if bool(f[1].any())}
    if not trained:
        raise ValueError("no layer of the adapter has been trained: every B is zero")
    stored = {name: weights.of_layer(name) for name in trained}
    shapes = {name: (b.shape[0], a.shape[1]) for name, (a, b, _) in trained.items()}
    turned = {n: weights.shape(stored[n]) == shape[::-1] for n, shape in shapes.items() if shape[0] != shape[1]}
    squares_turned = bool(turned) and all(turned.values())
    found = {}
    for name, (a, b, scaling) in tqdm(trained.items(), desc="change rates", unit="layer", disable=not progress):
        weight, a, b = (t.to(device).float() for t in (weights.load(stored[name]), a, b))
        weight = weight.t() if turned.get(name, squares_turned) else weight
        try:
            rates = change_rates(weight, a, b, scaling=scaling, method="exact")
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        found[name] = LayerRates(rates.rate.cpu(), rates.sigma.cpu())
    return found


def overlap(first: dict[str, LayerRates], second: dict[str, LayerRates], s: int) -> float:
    """The mean share, over common layers, of the top s of one among the top s of the other."""
    common = first.keys() & second.keys()
    if not common:
        raise ValueError("the adapters have no layer in common")
    return float(torch.stack([direction_recall(first[n].top(s), second[n].top(s)) for n in common]).mean())


def agreement(found: Sequence[dict[str, LayerRates]], truth: dict[str, LayerRates]) -> list[tuple[float, float]]:
    """(accuracy, recall) of each against the truth, as the paper counts: top 8 in the true top 16, true top 4 in the top 8."""
    result = []
    for rates in found:
        names = rates.keys() & truth.keys()
        accuracy = [direction_accuracy(rates[n].top(8), truth[n].top(16)) for n in names]
        recall = [direction_recall(rates[n].top(8), truth[n].top(4)) for n in names]
        result.append((float(torch.stack(accuracy).mean()), float(torch.stack(recall).mean())))
    return result
