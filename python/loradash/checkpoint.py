"""Adapters on disk, in our own file format."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from loradash_kernels.files import replace_file

from .adapters import add_adapter, as_active, check_new_adapter
from .base_layers import features
from .config import DashConfig
from .distributed import assign, gathered, reshard
from .experts import ExpertParameter
from .model import merge_layers, merged_factors, put_adapters, refuse_refreezing, train_sigma_alone
from .parked import DEFAULT, PARTS, adapter_shapes
from .slices import LinearSlice
from .state import STATE, OwnLayer, dash_state, own_layers, states, unwrap
from .targets import (
    as_trained,
    is_target,
    is_target_parameter,
    module_tensors,
    target_layers,
    target_parameters,
    trainable_modules,
)
from .units import Units, whole
from .zero import whole_shape

FORMAT = "loradash-1"
FILE_NAME = "loradash_adapter.safetensors"


class AdapterError(ValueError):
    """A file that is no adapter, or not one for this model. The model is unchanged."""


class Adapter(NamedTuple):
    """What a file holds."""

    tensors: dict[str, Tensor]
    config: DashConfig
    step: int
    dash_only: bool


def file_of(path: str | os.PathLike) -> Path:
    path = Path(path)
    return path if path.suffix == ".safetensors" else path / FILE_NAME


def adapter_tensors(model: nn.Module, config: DashConfig) -> dict[str, Tensor]:
    return {key: t for _, tensors in _by_module(model, config) for key, t in tensors().items()}


def _by_module(model: nn.Module, config: DashConfig) -> Iterator[tuple[Any, Callable[[], dict[str, Tensor]]]]:
    """Every layer and module that the file has something of, and what gives that."""
    for name, layer in own_layers(model).items():
        yield layer, partial(_of_layer, name, layer, config)
    for name, module in trainable_modules(model, config).items():
        yield module, partial(module_tensors, name, module)


def _of_layer(name: str, layer: OwnLayer, config: DashConfig) -> dict[str, Tensor]:
    tensors = {f"{name}.{key}": getattr(layer, key) for key in PARTS}
    if config.train_bias and layer.bias is not None:
        tensors[f"{name}.bias"] = layer.bias
    return tensors


def _gathered(model: nn.Module, config: DashConfig) -> dict[str, Tensor]:
    """Copies of everything, whole, on the CPU."""
    units = Units(model)
    found: dict[str, Tensor] = {}
    for module, tensors in _by_module(model, config):
        with units.whole(module):
            found |= {key: gathered(t).cpu().contiguous().clone() for key, t in tensors().items()}
    return found


def save_adapter(model: nn.Module, path: str | os.PathLike, adapter: str | None = None) -> Path:
    """Writes everything that training changed, the phase and the step to one safetensors file, replaced atomically.

    Sharded parameters (FSDP2, FSDP1, DTensor) are gathered: every process must call this, with a path of its own or the same.

    Args:
        path: a file ending in .safetensors, or a folder, which then gets `loradash_adapter.safetensors`.
        adapter: a name of `adapter_names(model)`; None takes the active one. Its name is not in the file.

    Returns the file. The settings are JSON in its header, under "loradash".
    """
    if adapter is not None:
        with as_active(model, adapter):
            return save_adapter(model, path)
    own_layers(model, "model.save_pretrained(path)")
    state = dash_state(model)
    reshard(model)
    tensors = _gathered(model, state.config)
    _check_whole(model, tensors)
    about = {"config": state.config.to_dict(), "step": state.step, "dash_only": state.dash_only}
    header = {"format": FORMAT, "loradash": json.dumps(about)}
    file = file_of(path)
    replace_file(file, lambda temporary: save_file(tensors, temporary, metadata=header))
    return file


def _check_whole(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    for name, layer in own_layers(model).items():
        for key, shape in layer.shapes(layer.config).items():
            found = tuple(tensors[f"{name}.{key}"].shape)
            if found != shape:
                raise ValueError(f"{name}.{key} has shape {found}, wanted {shape}: not the whole parameter")


def read_safetensors(file: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """The header and all tensors of a file."""
    with safe_open(str(file), framework="pt") as opened:
        return opened.metadata() or {}, {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118


def read_adapter(file: Path) -> Adapter:
    try:
        header, tensors = read_safetensors(file)
        if header.get("format") != FORMAT:
            raise AdapterError(f"{file}: no LoRA-Dash adapter (format {header.get('format')!r}, wanted {FORMAT!r})")
        about = json.loads(header["loradash"])
        config = DashConfig.from_dict(about["config"])
        return Adapter(tensors, config, _step(about["step"]), _flag(about.get("dash_only", False)))
    except AdapterError:
        raise
    # Whatever the readers of the format or of JSON raise, the file is at fault.
    except Exception as error:
        reason = f"no {error}" if isinstance(error, KeyError) else error
        raise AdapterError(f"{file}: cannot be read as a LoRA-Dash adapter: {reason}") from error


def _step(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"step must be an integer of at least 0, got {value!r}")
    return value


def _flag(value: Any) -> bool:
    if type(value) is not bool:
        raise ValueError(f"dash_only must be true or false, got {value!r}")
    return value


def _wanted(file: Path, model: nn.Module, config: DashConfig) -> dict[str, Tensor]:
    """The tensors that these settings would give to a model without adapters; new ones on meta, for shape and dtype."""
    wanted: dict[str, Tensor] = {}
    for name, linear in target_layers(model, config).items():
        k, n = features(linear)
        wanted |= _new_tensors(name, adapter_shapes(n, k, config.for_module(name)))
        if config.train_bias and linear.bias is not None:
            wanted[f"{name}.bias"] = linear.bias  # type: ignore[assignment]
        _check_real(file, {f"{name}.{key}": t for key, t in _state(linear).items() if isinstance(t, Tensor)})
    for name, (module, key) in target_parameters(model, config).items():
        layer = ExpertParameter(module, key, config.for_module(name), name)
        wanted |= _new_tensors(name, layer.shapes(layer.config))
        if config.train_bias and layer.bias is not None:
            wanted[f"{name}.bias"] = layer.bias
        _check_real(file, {name: layer.weight})
    for name, module in trainable_modules(model, config).items():
        kept = module_tensors(name, module)
        _check_real(file, kept)
        wanted |= kept
    return wanted


def _state(linear: nn.Module) -> dict[str, Any]:
    """What a layer computes with; a part of a fused one has that there."""
    return (linear.whole if isinstance(linear, LinearSlice) else linear).state_dict()


def _new_tensors(name: str, shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """What an adapted layer adds, on meta."""
    return {
        f"{name}.{key}": torch.empty(shape, dtype=torch.bool if key == "launched" else torch.float32, device="meta")
        for key, shape in shapes.items()
    }


def _check_settings(file: Path, model: nn.Module, config: DashConfig, own: dict[str, Tensor]) -> None:
    """Do the settings of a file describe these adapters? Their tensors may have the right shapes all the same."""
    problems = [f"{key} is kept by one alone" for key in own.keys() ^ adapter_tensors(model, config).keys()]
    for name, layer in own_layers(model).items():
        is_one = is_target_parameter if isinstance(layer, ExpertParameter) else is_target
        problems += [] if is_one(name, config) else [f"{name} is no target"]
        for key, shape in layer.shapes(config.for_module(name)).items():
            found = tuple(whole_shape(own[f"{name}.{key}"]))
            problems += [] if found == shape else [f"{name}.{key} would have shape {shape}, the model's has {found}"]
    if problems:
        raise AdapterError(f"{file}: its settings do not fit the model: {'; '.join(sorted(problems)[:5])}")


def _check_real(file: Path, tensors: dict[str, Tensor]) -> None:
    empty = [name for name, tensor in tensors.items() if tensor.is_meta]
    if empty:
        raise AdapterError(
            f"{file}: the model is on the meta device, which keeps no values ({', '.join(empty[:4])}): load its weights, or "
            "materialise it with to_empty(device=...), before load_adapter"
        )


def fitted(file: Path, found: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, Tensor]:
    """The file's tensors in the dtypes of the model. Raises AdapterError for whatever does not fit."""
    problems = [f"{k} is missing" for k in wanted.keys() - found.keys()]
    problems += [f"{k} has no place in the model" for k in found.keys() - wanted.keys()]
    values: dict[str, Tensor] = {}
    for key in wanted.keys() & found.keys():
        theirs, ours = found[key], wanted[key]
        if theirs.shape != whole_shape(ours):
            problems.append(f"{key} has shape {tuple(theirs.shape)}, the model wants {tuple(whole_shape(ours))}")
            continue
        values[key] = theirs.to(ours.dtype)
        problem = _spoiled(key, theirs, values[key])
        problems += [f"{key} {problem}"] if problem else []
    if problems:
        more = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
        raise AdapterError(f"{file}: does not fit the model: {'; '.join(sorted(problems)[:5])}{more}")
    return values


def _spoiled(key: str, theirs: Tensor, ours: Tensor) -> str | None:
    """What a change of dtype made of a tensor's values, where that is more than rounding."""
    there_and_back = f"is {theirs.dtype}, the model wants {ours.dtype}"
    if not (theirs.is_floating_point() and ours.is_floating_point()):
        same_kind = theirs.is_floating_point() == ours.is_floating_point()
        return None if same_kind and torch.equal(ours.to(theirs.dtype), theirs) else there_and_back
    finite = _finite(theirs)
    if key.rpartition(".")[2] in PARTS and not bool(finite.all()):
        return "is not finite"
    return None if bool((_finite(ours) == finite).all()) else f"{there_and_back}, which overflows"


def _finite(tensor: Tensor) -> Tensor:
    return (tensor.float() if torch.finfo(tensor.dtype).bits < 16 else tensor).isfinite()


def _exchange(file: Path, model: nn.Module, values: dict[str, Tensor], config: DashConfig) -> None:
    """Writes values and settings of all layers, merged ones too. If the new adapter cannot be merged, the old one stays."""
    layers = own_layers(model)
    merged = {name: layer for name, layer in layers.items() if layer.merged}
    factors = merged_factors(layers)
    before = _gathered(model, dash_state(model).config) if merged else {}
    settings = {name: layer.config for name, layer in layers.items()}
    _switch(model, merged, values, {name: config.for_module(name) for name in layers})
    try:
        merge_layers(model, merged, True, factors)
    except (ArithmeticError, RuntimeError, ValueError) as error:
        _switch(model, merged, before, settings)
        merge_layers(model, merged, True, factors)
        raise AdapterError(f"{file}: cannot be merged into this model: {error}") from error


@torch.no_grad()
def write_tensors(model: nn.Module, values: dict[str, Tensor]) -> None:
    """Copies whole tensors, by name, into the model's; sharded ones take their part."""
    with whole(model, write=True):
        for key, tensor in adapter_tensors(model, dash_state(model).config).items():
            assign(tensor, values[key])


def _switch(
    model: nn.Module, merged: dict[str, OwnLayer], values: dict[str, Tensor], settings: dict[str, DashConfig]
) -> None:
    for layer in merged.values():
        layer.unmerge()
    write_tensors(model, values)
    for name, layer in own_layers(model).items():
        layer.config = settings[name]


def load_adapter(model: nn.Module, path: str | os.PathLike, adapter: str | None = None) -> nn.Module:
    """Puts an adapter of `save_adapter` into a model, adapted already or not; training can go on at its step and phase.

    Everything is checked before anything is written. A merged model is merged again, with the new adapter. Where
    parameters are sharded each process writes its own part: every process must call this, on the same file.

    Args:
        adapter: the name of the adapter that takes it; one that an adapted model lacks is added, beside the others, and is
            parked. None takes the active one.

    Raises AdapterError, with the file's name, for a file that is missing, truncated or foreign, for tensors that are
    missing, left over, of another shape, not finite or too large for the model's dtype, and for a model on the meta device.
    """
    own_layers(model, "model.load_adapter(path, adapter_name)")
    adapted = getattr(unwrap(model), STATE, None) is not None
    if adapted and adapter is not None:
        return _load_beside(model, file_of(path), adapter)
    file = file_of(path)
    found = read_adapter(file)
    reshard(model)
    if not adapted:
        found = found._replace(config=as_trained(unwrap(model), found.config, found.tensors))
        values = fitted(file, found.tensors, _wanted(file, unwrap(model), found.config))
        try:
            put_adapters(unwrap(model), found.config, DEFAULT if adapter is None else adapter)
        except (ValueError, TypeError, RuntimeError) as error:
            raise AdapterError(f"{file}: the adapter does not fit the model: {error}") from error
    else:
        with whole(model):
            own = adapter_tensors(model, dash_state(model).config)
            _check_real(file, own)
            values = fitted(file, found.tensors, own)
            _check_settings(file, model, found.config, own)
        refuse_refreezing(model, found.dash_only)
    _exchange(file, model, values, found.config)
    _resume(model, found)
    return model


def _load_beside(model: nn.Module, file: Path, name: str) -> nn.Module:
    """Into one of several adapters, or a new one."""
    if name in states(model):
        with as_active(model, name):
            return load_adapter(model, file)
    found = read_adapter(file)
    try:
        check_new_adapter(model, name, found.config)
        values = fitted(file, found.tensors, _wanted(file, unwrap(model), found.config))
        add_adapter(model, name, found.config)
    except AdapterError:
        raise
    except (ValueError, RuntimeError) as error:
        raise AdapterError(f"{file}: the adapter does not fit the model: {error}") from error
    with as_active(model, name):
        _exchange(file, model, values, found.config)
        _resume(model, found)
    return model


def _resume(model: nn.Module, adapter: Adapter) -> None:
    # Schedules hold this object: it is changed, not replaced.
    state = dash_state(model)
    if adapter.dash_only or state.dash_only:
        train_sigma_alone(model, adapter.dash_only)
    state.config, state.step = adapter.config, adapter.step
