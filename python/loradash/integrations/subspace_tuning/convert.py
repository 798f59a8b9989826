"""Checkpoints of the authors' three code bases and ours, into one another."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch
from safetensors.torch import save_file
from torch import Tensor

from loradash_kernels.files import replace_bytes, replace_file

from ...checkpoint import FILE_NAME, FORMAT, AdapterError, read_safetensors
from ...config import DashConfig, matches
from .dialects import PEFT_PREFIX, WARMUP, Dialect, Parsed, parse
from .settings import authors_settings, dash_config
from .state_dicts import Weights, named, parts_of

_CONFIG = "adapter_config.json"
_FILES: dict[Dialect, str] = {
    "loradash": FILE_NAME,
    "cr_mr": "adapter_model.bin",
    "sdg": "adapter_model.safetensors",
    "loralib": "lora.pt",
}
_OF_FORKS = ("adapter_model.safetensors", "adapter_model.bin")


class Checkpoint(NamedTuple):
    """What a file of any of them holds: layers by name (parts by our names, on the CPU), what else trains, and settings."""

    layers: dict[str, dict[str, Tensor]]
    others: dict[str, Tensor]
    config: DashConfig
    step: int


def convert(
    source: str | os.PathLike,
    target: str | os.PathLike,
    into: Dialect,
    *,
    weights: Weights | None = None,
    settings: Mapping[str, Any] | None = None,
    step: int | None = None,
) -> dict[str, Any]:
    """Rewrites an adapter's file: the authors' (loralib, or their forks of PEFT in CR_MR and SdG) or ours into any of these.

    Everything is checked before anything is written.

    Args:
        source: a file (.safetensors, or what torch.load reads), or a folder of a fork of PEFT or of `save_adapter`. Whose
            keys it has is found out.
        target: a file or folder; of the forks a folder, which gets an adapter_config.json too.
        into: "loradash", "loralib", "cr_mr" or "sdg".
        weights: the frozen weights, a model or a state dict, for a source without U and V whose weights are not in it:
            they come back from `lora_change_a`, `lora_change_bb` and the SVD (`state_dicts.recovered_directions`).
        settings: arguments of the authors' layers or fields of their adapter_config.json, over those of the source's
            folder; lora_alpha must be in one. rank_pattern and alpha_pattern, by name, serve loralib as well.
        step: the optimizer steps that a source of theirs was trained, which it does not tell; by default 0 before launch
            and 100 after it.

    Their files keep neither step nor phase: their code starts its warm-up anew on them. Ours reads the phase from U.

    Returns the settings of the target. Raises AdapterError, naming file and key, for what cannot be read and for what has no
    counterpart.
    """
    if into not in get_args(Dialect):
        raise ValueError(f"into must be one of {get_args(Dialect)}, got {into!r}")
    if step is not None and (type(step) is not int or step < 0):
        raise ValueError(f"step must be an integer of at least 0, got {step!r}")
    file = _source_file(Path(source))
    try:
        found = _read(file, weights, settings or {}, step)
        tensors, about = _ours(found) if into == "loradash" else _theirs(found, into)
    except AdapterError:
        raise
    except (KeyError, ValueError, re.error) as error:
        raise AdapterError(f"{file}: {error}") from error
    _write(Path(target), into, tensors, about)
    return about["config"] if into == "loradash" else about


def _source_file(path: Path) -> Path:
    if not path.is_dir():
        return path
    found = [path / name for name in (FILE_NAME, *_OF_FORKS) if (path / name).is_file()]
    if len(found) != 1:
        names = ", ".join(file.name for file in found) or "none"
        raise AdapterError(f"{path}: wanted one of {FILE_NAME}, {', '.join(_OF_FORKS)} in the folder, found {names}")
    return found[0]


def _load(file: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Header (of safetensors) and tensors of a file."""
    try:
        if file.suffix == ".safetensors":
            return read_safetensors(file)
        tensors = torch.load(file, map_location="cpu", weights_only=True)
    # Whatever the readers of the formats raise, the file is at fault.
    except Exception as error:
        raise AdapterError(f"{file}: cannot be read: {error}") from error
    if not isinstance(tensors, dict):
        raise AdapterError(f"{file}: wanted a state dict, found {type(tensors).__name__}")
    for key, value in tensors.items():
        if not isinstance(value, Tensor):
            raise AdapterError(f"{file}: {key} is a {type(value).__name__}, wanted tensors alone")
    return {}, tensors


def _read(file: Path, weights: Weights | None, settings: Mapping[str, Any], step: int | None) -> Checkpoint:
    header, tensors = _load(file)
    parsed = parse(tensors)
    if parsed.dialect == "loradash":
        if header.get("format") != FORMAT:
            raise ValueError(f"format {header.get('format')!r}, wanted {FORMAT!r}")
        about = json.loads(header["loradash"])
        if about.get("dash_only"):
            raise ValueError("dash_only has no counterpart in the authors' code")
        return Checkpoint(parts_of(parsed, weights), parsed.rest, DashConfig.from_dict(about["config"]), about["step"])
    settings = {**_settings_of(file), **settings}
    layers = parts_of(parsed, weights)
    others, trainable = _trained_whole(parsed, settings)
    config = dash_config(settings, layers, trainable)
    for parts in layers.values():
        parts.update({part: t.float() for part, t in parts.items() if part != "launched"})
    return Checkpoint(layers, others, config, _steps(parsed, layers, step))


def _settings_of(file: Path) -> dict[str, Any]:
    beside = file.with_name(_CONFIG)
    if not beside.is_file():
        return {}
    try:
        found = json.loads(beside.read_text())
    except ValueError as error:
        raise AdapterError(f"{beside}: {error}") from error
    if not isinstance(found, dict):
        raise AdapterError(f"{beside}: wanted settings by name")
    return found


def _steps(parsed: Parsed, layers: Mapping[str, Mapping[str, Tensor]], step: int | None) -> int:
    if step is not None:
        return step
    flags = [int(parts["flag"][0]) for parts in parsed.layers.values() if "flag" in parts]
    launched = any(bool(parts.get("launched", False)) for parts in layers.values())
    return max(flags, default=WARMUP if launched else 0)


def _trained_whole(parsed: Parsed, settings: Mapping[str, Any]) -> tuple[dict[str, Tensor], list[str]]:
    """What trained beside the adapters, biases of their layers included, and the names of the modules that trained whole.

    Beside the frozen weights of its layers a state dict holds the whole model: what is not in modules_to_save is left there.
    """
    saved = settings.get("modules_to_save") or []
    biases = {f"{name}.bias" for name in parsed.layers} if settings.get("bias") == "lora_only" else set()
    whole = all(f"{name}.weight" in parsed.rest for name in parsed.layers)
    kept: dict[str, Tensor] = {}
    modules: list[str] = []
    for key, tensor in parsed.rest.items():
        parts = key.split(".")
        paths = [".".join(parts[:i]) for i in range(1, len(parts))]
        module = next((path for path in paths if matches(path, saved)), None)
        if module is not None:
            kept[key] = tensor
            modules += [] if module in modules else [module]
        elif key in biases:
            kept[key] = tensor
        elif not whole and key not in {f"{name}.{own}" for name in parsed.layers for own in ("weight", "bias")}:
            raise ValueError(f"{key} is no part of an adapter and of no module in modules_to_save = {saved}")
    return kept, modules


def _ours(found: Checkpoint) -> tuple[dict[str, Tensor], dict[str, Any]]:
    about = {"config": found.config.to_dict(), "step": found.step, "dash_only": False}
    return {**named(found.layers, "loradash", None), **found.others}, about


def _theirs(found: Checkpoint, dialect: Dialect) -> tuple[dict[str, Tensor], dict[str, Any]]:
    launched = any(bool(parts.get("launched", False)) for parts in found.layers.values())
    names = list(found.layers)
    biases = {f"{name}.bias" for name in names}
    modules = list(dict.fromkeys(key.rpartition(".")[0] for key in found.others if key not in biases))
    about = authors_settings(found.config, names, dialect, modules, launched)
    tensors = {**named(found.layers, dialect, None), **found.others}
    prefix = "" if dialect == "loralib" else PEFT_PREFIX
    return {prefix + key: tensor for key, tensor in tensors.items()}, about


def _write(target: Path, into: Dialect, tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
    file = target if target.suffix in (".safetensors", ".bin", ".pt", ".pth") else target / _FILES[into]
    tensors = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}
    header = {"format": FORMAT, "loradash": json.dumps(about)} if into == "loradash" else {"format": "pt"}
    if file.suffix == ".safetensors":
        replace_file(file, lambda temporary: save_file(tensors, temporary, metadata=header))
    elif into == "loradash":
        raise ValueError(f"{file}: our adapters are .safetensors files")
    else:
        replace_file(file, lambda temporary: torch.save(tensors, temporary))
    if into in ("cr_mr", "sdg"):
        replace_bytes(file.with_name(_CONFIG), json.dumps(about, indent=2).encode())
