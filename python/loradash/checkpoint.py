"""Adapters on disk: our own file, and PEFT's."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .config import DashConfig
from .inject import STATE as _STATE
from .inject import DashState, apply_dash, dash_layers, dash_state, trainable_modules, unwrap

FORMAT = "loradash-1"
FILE_NAME = "loradash_adapter.safetensors"
_TENSORS = ("lora_a", "lora_b", "dash_sigma", "dash_u", "dash_vt", "launched")


class AdapterError(ValueError):
    """A file that is no adapter, or not one for this model. The model is unchanged."""


def _file(path: str | os.PathLike) -> Path:
    path = Path(path)
    return path if path.suffix == ".safetensors" else path / FILE_NAME


def replace_file(path: Path, write: Callable[[str], None]) -> None:
    """Writes beside `path` and renames: readers see the old file or the new one, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".partial")
    os.close(handle)
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _adapter_tensors(model: nn.Module, config: DashConfig) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, layer in dash_layers(model).items():
        for key in _TENSORS:
            tensors[f"{name}.{key}"] = getattr(layer, key)
        if config.train_bias and layer.bias is not None:
            tensors[f"{name}.bias"] = layer.bias
    for name, module in trainable_modules(model, config).items():
        for key, tensor in module.state_dict().items():
            tensors[f"{name}.{key}"] = tensor
    return tensors


def save_adapter(model: nn.Module, path: str | os.PathLike) -> Path:
    """Writes everything that training changed, the phase and the step to one safetensors file, replaced atomically.

    Args:
        path: a file ending in .safetensors, or a folder, which then gets `loradash_adapter.safetensors`.

    Returns the file. The settings are JSON in its header, under "loradash".
    """
    state = dash_state(model)
    tensors = {k: t.detach().cpu().contiguous().clone() for k, t in _adapter_tensors(model, state.config).items()}
    header = {"format": FORMAT, "loradash": json.dumps({"config": state.config.to_dict(), "step": state.step})}
    file = _file(path)
    replace_file(file, lambda temporary: save_file(tensors, temporary, metadata=header))
    return file


def load_adapter(model: nn.Module, path: str | os.PathLike) -> nn.Module:
    """Puts an adapter of `save_adapter` into a model, adapted already or not; training can go on at its step and phase.

    Everything is checked before anything is written. Raises AdapterError, with the file's name, for a file that is
    missing, truncated or foreign, and for tensors that are missing, left over or of another shape.
    """
    file = _file(path)
    tensors, config, step = _read(file)
    fresh = getattr(unwrap(model), _STATE, None) is None
    wanted = _wanted_shapes(model, config) if fresh else {k: t.shape for k, t in _own_tensors(model).items()}
    _compare(file, {k: t.shape for k, t in tensors.items()}, wanted)
    if fresh:
        apply_dash(unwrap(model), config)
    own = _own_tensors(model)
    with torch.no_grad():
        for key, tensor in tensors.items():
            own[key].copy_(tensor)
    setattr(unwrap(model), _STATE, DashState(config, step))
    for name, layer in dash_layers(model).items():
        layer.config = config.for_module(name)
    return model


def _own_tensors(model: nn.Module) -> dict[str, Tensor]:
    return _adapter_tensors(model, dash_state(model).config)


def _read(file: Path) -> tuple[dict[str, Tensor], DashConfig, int]:
    try:
        with safe_open(str(file), framework="pt") as opened:
            header = opened.metadata() or {}
            if header.get("format") != FORMAT:
                raise AdapterError(f"{file}: no LoRA-Dash adapter (format {header.get('format')!r}, wanted {FORMAT!r})")
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
        about = json.loads(header["loradash"])
        return tensors, DashConfig.from_dict(about["config"]), int(about["step"])
    except AdapterError:
        raise
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise AdapterError(f"{file}: cannot be read as a LoRA-Dash adapter: {error}") from error


def _wanted_shapes(model: nn.Module, config: DashConfig) -> dict[str, torch.Size]:
    """Shapes of the adapter that this config would give the model, found on a copy without memory."""
    import copy

    memo = {id(t): t.to("meta") if not isinstance(t, nn.Parameter) else nn.Parameter(t.to("meta"), False)
            for t in (*model.parameters(), *model.buffers())}  # fmt: skip
    shadow = copy.deepcopy(unwrap(model), memo)
    try:
        return {k: t.shape for k, t in _adapter_tensors(apply_dash(shadow, config), config).items()}
    except ValueError as error:
        raise AdapterError(f"the adapter does not fit the model: {error}") from error


def _compare(file: Path, found: dict[str, torch.Size], wanted: dict[str, torch.Size]) -> None:
    problems = [f"{k} is missing" for k in wanted.keys() - found.keys()]
    problems += [f"{k} has no place in the model" for k in found.keys() - wanted.keys()]
    problems += [
        f"{k} has shape {tuple(found[k])}, the model wants {tuple(wanted[k])}"
        for k in wanted.keys() & found.keys()
        if found[k] != wanted[k]
    ]
    if problems:
        more = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
        raise AdapterError(f"{file}: does not fit the model: {'; '.join(sorted(problems)[:5])}{more}")


def _write_text(path: str, text: str) -> None:
    Path(path).write_text(text)


# --- export ----------------------------------------------------------------------------------------------------------


def export_lora(model: nn.Module, path: str | os.PathLike) -> Path:
    """Folds the dash term into a LoRA of rank r + s, in PEFT's file format: served by whatever serves LoRA.

    scaling · B A + U diag(Δσ) Vᵀ = [scaling · B | U diag(Δσ)] [A; Vᵀ], with PEFT's own scaling set to 1. Modules that train
    as a whole go along as `modules_to_save`.

    Args:
        path: a folder; gets adapter_config.json and adapter_model.safetensors.

    Raises ValueError where biases were trained: PEFT has no place for a bias of its own on an adapted layer.
    """
    config = dash_state(model).config
    if config.train_bias:
        raise ValueError("export_lora cannot carry trained biases (train_bias=True); merge(model) and save the weights")
    folder = Path(path)
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for name, layer in dash_layers(model).items():
        a = torch.cat((layer.lora_a.detach(), layer.dash_vt))
        b = torch.cat((layer.scaling * layer.lora_b.detach(), layer.dash_u * layer.dash_sigma.detach()), 1)
        ranks[name] = a.shape[0]
        prefix = f"base_model.model.{name}"
        tensors[f"{prefix}.lora_A.weight"], tensors[f"{prefix}.lora_B.weight"] = a, b
    whole = trainable_modules(model, config)
    for name, module in whole.items():
        for key, tensor in module.state_dict().items():
            tensors[f"base_model.model.{name}.{key}"] = tensor
    about: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": getattr(getattr(unwrap(model), "config", None), "_name_or_path", None),
        "r": max(ranks.values()),
        "lora_alpha": max(ranks.values()),
        "rank_pattern": {f"^{name}$".replace(".", r"\."): rank for name, rank in ranks.items()},
        "alpha_pattern": {f"^{name}$".replace(".", r"\."): rank for name, rank in ranks.items()},
        "target_modules": sorted(ranks),
        "modules_to_save": sorted(whole) or None,
        "lora_dropout": config.dropout,
        "bias": "none",
        "use_rslora": False,
        "fan_in_fan_out": any(layer.transposed for layer in dash_layers(model).values()),
        "inference_mode": True,
    }
    contiguous = {k: t.detach().cpu().contiguous().clone() for k, t in tensors.items()}
    replace_file(folder / "adapter_model.safetensors", lambda f: save_file(contiguous, f, metadata={"format": "pt"}))
    replace_file(folder / "adapter_config.json", lambda f: _write_text(f, json.dumps(about, indent=2)))
    return folder
