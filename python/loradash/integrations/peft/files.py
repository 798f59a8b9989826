"""A LORADASH adapter as a plain LoRA in PEFT's files, and a plain LoRA as the start of a LORADASH one."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.utils import load_peft_weights
from safetensors.torch import save_file
from torch import Tensor, nn

from loradash.bypass import child_at, mended_children
from loradash.distributed import gathered, reshard
from loradash.peft_layout import PREFIX, Unfaithful
from loradash_kernels.files import replace_bytes, replace_file

from .config import DashLoraConfig
from .versions import adapter_state_dict

_WEIGHTS, _SETTINGS = "adapter_model.safetensors", "adapter_config.json"
_DASH = ".lora_dash_"
# Of the file that was read, not of the adapter that is made from it.
_NOT_TAKEN = ("peft_type", "peft_version", "auto_mapping", "inference_mode", "runtime_config")


def export_lora(root: nn.Module, adapter: str, layers: Mapping[str, Any], folder: Path) -> None:
    """Writes a plain LoRA of rank r + s with the outputs that the adapter has now, and all that PEFT saves beside it.

    Args:
        root: the base model. layers: those that have the adapter, by name.

    Raises ValueError, before anything is written, for layers whose parent would pass PEFT's own LoRA by.
    """
    passed = {id(child_at(parent, child)) for parent in root.modules() for child in mended_children(parent)}
    for name, layer in layers.items():
        if id(layer) in passed:
            raise Unfaithful(
                f"{name}: its parent reads the weight of this layer, so that PEFT's LoRA would be passed by; merge_and_unload() "
                "and save the weights"
            )
    reshard(root)
    tensors = _tensors(root, adapter, layers)
    rank = max(layer.folded(adapter)[0].shape[0] for layer in layers.values())
    settings = _settings(root, root.__dict__["peft_config"][adapter], rank)
    replace_file(folder / _WEIGHTS, lambda file: save_file(tensors, file, metadata={"format": "pt"}))
    replace_bytes(folder / _SETTINGS, json.dumps(settings, indent=2, sort_keys=True).encode())


def _tensors(root: nn.Module, adapter: str, layers: Mapping[str, Any]) -> dict[str, Tensor]:
    """Everything under PEFT's names, on the CPU; A and B of all layers of one rank, short ones with zeros, in float32."""
    saved = adapter_state_dict(root, adapter)
    tensors = {key: gathered(t) for key, t in saved.items() if _DASH not in key}
    folded = {name: layer.folded(adapter) for name, layer in layers.items()}
    rank = max(a.shape[0] for a, _ in folded.values())
    for name, (a, b) in folded.items():
        more = rank - a.shape[0]
        tensors[f"{name}.lora_A.weight"] = nn.functional.pad(a.float(), (0, 0, 0, more))
        tensors[f"{name}.lora_B.weight"] = nn.functional.pad(b.float(), (0, more))
        bias = f"{name}.lora_B.bias"
        if bias in tensors:
            tensors[bias] = tensors[bias] * layers[name].scaling[adapter]
    return {PREFIX + key: t.detach().cpu().contiguous().clone() for key, t in tensors.items()}


def _settings(root: nn.Module, config: DashLoraConfig, rank: int) -> dict[str, Any]:
    """adapter_config.json."""
    same = {f.name: getattr(config, f.name) for f in dataclasses.fields(LoraConfig) if f.init}
    own = {"r": rank, "lora_alpha": rank, "rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False}
    rest = {"init_lora_weights": True, "inference_mode": True, "peft_type": None}
    settings = LoraConfig(**{**same, **own, **rest}).to_dict()
    if settings["base_model_name_or_path"] is None:
        settings["base_model_name_or_path"] = root.__dict__.get("name_or_path") or None
    if settings["task_type"] is None:
        settings["auto_mapping"] = {"base_model_class": type(root).__name__, "parent_library": type(root).__module__}
    return {key: sorted(value) if isinstance(value, set) else value for key, value in settings.items()}


def from_lora(
    model: nn.Module,
    folder: str | os.PathLike,
    adapter_name: str = "default",
    *,
    directions: int = 8,
    prelaunch_steps: int = 100,
    svd: str = "auto",
    lora_dropout: float | None = None,
) -> PeftModel:
    """A LORADASH adapter that starts at a trained plain LoRA of PEFT's: its A, B, rank, alpha, targets and all that lies beside.

    Args:
        model: the base model, or a PeftModel with LORADASH adapters, which gets one more.
        folder: of a LoRA that `save_pretrained` wrote.
        prelaunch_steps: 0 launches with the first optimizer step.
        lora_dropout: the file's own by default.

    Returns the PeftModel, which trains and is before launch. Raises ValueError, with the model unchanged, for a file that is no
    plain LoRA (variants of LoRA have settings that LoRA-Dash does not) or does not fit the model.
    """
    theirs = PeftConfig.from_pretrained(str(folder))
    if not isinstance(theirs, LoraConfig) or theirs.peft_type != "LORA":
        raise ValueError(
            f"{folder}: wanted a LoRA of PEFT's, got {getattr(theirs.peft_type, 'value', theirs.peft_type)}"
        )
    taken = {f.name: getattr(theirs, f.name) for f in dataclasses.fields(theirs) if f.init and f.name not in _NOT_TAKEN}
    ours = {"directions": directions, "prelaunch_steps": prelaunch_steps, "svd": svd}
    dropout = {} if lora_dropout is None else {"lora_dropout": lora_dropout}
    config = DashLoraConfig(**{**taken, **ours, **dropout})
    weights = load_peft_weights(str(folder), device="cpu")
    trained = [(p, p.requires_grad) for p in model.parameters()]
    if isinstance(model, PeftModel):
        model.add_adapter(adapter_name, config)
        adapted: PeftModel = model
        undo: Callable[[], Any] = functools.partial(model.delete_adapter, adapter_name)
    else:
        adapted = get_peft_model(model, config, adapter_name)
        undo = adapted.unload
    own = adapter_state_dict(adapted, adapter_name)
    dash = {key: tensor for key, tensor in own.items() if _DASH in key}
    problem = _misfit({key: t for key, t in own.items() if key not in dash}, weights)
    if problem:
        undo()
        for parameter, trains in trained:
            parameter.requires_grad_(trains)
        raise ValueError(f"{folder}: does not fit the model: {problem}")
    with torch.no_grad():
        set_peft_model_state_dict(adapted, {**dash, **weights}, adapter_name=adapter_name)
    return adapted


def _misfit(own: dict[str, Tensor], found: dict[str, Tensor]) -> str | None:
    """What keeps the tensors of a file from being those of an adapter, or None."""
    alone = sorted(own.keys() ^ found.keys())
    if alone:
        return f"{', '.join(alone[:4])} would be in one of the two alone"
    wrong = [key for key in own if own[key].shape != found[key].shape]
    return f"{wrong[0]} is {tuple(found[wrong[0]].shape)}, wanted {tuple(own[wrong[0]].shape)}" if wrong else None
