"""The modules of a model that a `DashConfig` names: layers to adapt, and modules that train as a whole."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Container

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .base_layers import is_linear, is_pointwise, pointwise_refusal
from .config import DashConfig, matches, unmatched, without_match
from .convolution import DashConvolution
from .expert_modules import refusal, stacked_names
from .linear import DashLinear
from .slices import LinearSlice
from .state import plain_name, unwrap


def target_layers(model: nn.Module, config: DashConfig) -> dict[str, nn.Module]:
    """The layers that these settings adapt, by plain name, adapted by others already or not. Not what is part of another one."""
    found: dict[str, nn.Module] = {}
    inside: set[nn.Module] = set()
    # A layer comes before its own parts.
    for name, module in _adaptable(model, config).items():
        if is_target(name, config) and module not in inside:
            found[name] = module
            inside.update(module.modules())
    return found


def target_parameters(model: nn.Module, config: DashConfig) -> dict[str, tuple[nn.Module, str]]:
    """The experts' parameters that these settings adapt, by plain name: the module and the parameter's name in it.

    A module that occurs twice is found under its first name. Raises ValueError for one that cannot be adapted.
    """
    found: dict[str, tuple[nn.Module, str]] = {}
    for name, place in _parameters(model).items():
        if is_target_parameter(name, config):
            problem = refusal(*place)
            if problem:
                raise ValueError(f"target_parameters: {name} {problem}")
            found[name] = place
    return found


def is_target_parameter(name: str, config: DashConfig) -> bool:
    """Do these settings adapt an experts' parameter of this name?"""
    return matches(name, config.target_parameters) and _is_left_to_adapt(name, config)


def _parameters(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    return {
        plain_name(f"{name}.{key}"): (module, key)
        for name, module in model.named_modules()
        for key in module._parameters
    }


def is_target(name: str, config: DashConfig) -> bool:
    """Do these settings adapt a linear layer of this name?"""
    wanted = config.target_modules is None or matches(name, config.target_modules)
    return wanted and _is_left_to_adapt(name, config)


def _is_left_to_adapt(name: str, config: DashConfig) -> bool:
    return not matches(name, config.exclude_modules) and not _trains_whole(name, config)


def _linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Linear layers by plain name and convolutions that are adapted as such, without the parts of adapted ones."""
    found = {plain_name(name): m for name, m in model.named_modules() if isinstance(m, DashLinear) or is_linear(m)}
    inside = {part for m in found.values() if isinstance(m, DashLinear) for part in m.modules() if part is not m}
    return {name: m for name, m in found.items() if m not in inside}


def _adaptable(model: nn.Module, config: DashConfig) -> dict[str, nn.Module]:
    """Linear layers, and where target_modules names any layers convolutions that are linear ones over channels, whether another
    adapter has them already or not."""
    found = _linear_layers(model)
    if config.target_modules is None:
        return {name: module for name, module in found.items() if not isinstance(module, DashConvolution)}
    inside = {part for module in found.values() for part in module.modules()}
    others = {plain_name(name): module for name, module in model.named_modules() if module not in inside}
    return found | {name: module for name, module in others.items() if is_pointwise(module)}


def _refused(model: nn.Module, config: DashConfig) -> dict[str, nn.Module]:
    """Layers that target_modules names and that cannot be adapted, and have numbers of their own that could have been meant.

    A name in a list means a layer, whatever its numbers are. A regular expression means a part of a model, where vectors
    (norms, gates) come along: of these it means the layers with matrices. Experts of which target_parameters adapts a parameter
    are adapted, not refused.
    """
    if config.target_modules is None:
        return {}
    adaptable = _adaptable(model, config)
    inside = {part for module in adaptable.values() for part in module.modules()}
    # Where parts of a fused layer are targets, a pattern that matches the whole too means them.
    named = [module for name, module in adaptable.items() if is_target(name, config)]
    inside.update(part.whole for module in named for part in module.modules() if isinstance(part, LinearSlice))
    least = 2 if isinstance(config.target_modules, str) else 0
    modules = {plain_name(name): module for name, module in model.named_modules() if module not in inside}
    return {
        name: m
        for name, m in modules.items()
        if is_target(name, config)
        and _has_numbers(m, least)
        and not any(is_target_parameter(f"{name}.{key}", config) for key in m._parameters)
    }


def as_trained(model: nn.Module, config: DashConfig, tensors: Container[str]) -> DashConfig:
    """The settings of an adapter with these tensors. Where an older version wrote them, layers may be named that are not linear,
    and had been passed over: they are left out."""
    pointwise = [name for name, module in target_layers(model, config).items() if is_pointwise(module)]
    lost = [name for name in (*_refused(model, config), *pointwise) if f"{name}.lora_a" not in tensors]
    if not lost:
        return config
    given = config.exclude_modules
    before = [given] if isinstance(given, str) else [rf"(.*\.)?{re.escape(name)}" for name in given or ()]
    expressions = [*before, *map(re.escape, lost)]
    return dataclasses.replace(config, exclude_modules="|".join(f"({one})" for one in expressions))


def _has_numbers(module: nn.Module, least: int) -> bool:
    """Has a module itself a parameter of so many dimensions?"""
    own = [p for p in module._parameters.values() if p is not None]
    return hasattr(module, "parametrizations") or any(is_lazy(p) or p.dim() >= least for p in own)


def _trains_whole(name: str, config: DashConfig) -> bool:
    parts = name.split(".")
    return any(matches(".".join(parts[: i + 1]), config.trainable_modules) for i in range(len(parts)))


def check_patterns(model: nn.Module, config: DashConfig) -> None:
    """Raises ValueError where the settings adapt nothing, or a pattern of theirs matches nothing in the model."""
    linears = _adaptable(model, config)
    refused = _refused(model, config)
    if refused:
        raise ValueError(
            f"target_modules={config.target_modules!r} names layers that cannot be adapted: {_described(refused)}. Leave them out "
            "by exclude_modules, or train them whole by trainable_modules; target_modules=None takes every linear layer"
        )
    parameters = _parameters(model) if config.target_parameters is not None else {}
    lost = without_match(config.target_parameters, list(parameters))
    if lost:
        stacked = list(map(plain_name, stacked_names(model)))
        raise ValueError(
            f"target_parameters: {lost[0]!r} matches no parameter; experts' parameters that can be adapted: "
            f"{', '.join(stacked[:8]) or 'none'}{', ...' if len(stacked) > 8 else ''}"
        )
    experts = target_parameters(model, config)
    if not target_layers(model, config) and not experts:
        raise ValueError(
            f"target_modules={config.target_modules!r} matches none of the {len(linears)} linear layers: "
            f"{', '.join(list(linears)[:8])}{', ...' if len(linears) > 8 else ''}"
        )
    # What is left out of them is named too.
    stacked = [name for name in parameters if matches(name, config.target_parameters)]
    modules = {plain_name(name): module for name, module in model.named_modules()}
    # What could be refused can be left out.
    others = [] if config.target_modules is None else [name for name, m in modules.items() if _has_numbers(m, 0)]
    problems = unmatched(config, [*linears, *stacked, *others], list(modules))
    if problems:
        raise ValueError("; ".join(problems))


def _described(modules: dict[str, nn.Module]) -> str:
    shown = [f"{name or 'the model'}: {_no_layer(module)}" for name, module in list(modules.items())[:4]]
    return "; ".join(shown) + ("; ..." if len(modules) > 4 else "")


def _no_layer(module: nn.Module) -> str | None:
    stacked = list(stacked_names(module))
    return f"its {', '.join(stacked)} are adapted by target_parameters" if stacked else pointwise_refusal(module)


def trainable_modules(model: nn.Module, config: DashConfig) -> dict[str, nn.Module]:
    """The modules that train as a whole, outermost only, by plain name."""
    found: dict[str, nn.Module] = {}
    for wrapped, module in unwrap(model).named_modules():
        name = plain_name(wrapped)
        inside = name in found or any(name.startswith(f"{outer}.") for outer in found)
        if not inside and matches(name, config.trainable_modules):
            found[name] = module
    return found


def module_tensors(name: str, module: nn.Module) -> dict[str, Tensor]:
    """The state of a module that trains as a whole, under its name, parameters themselves. ValueError for state that is no tensor."""
    tensors: dict[str, Tensor] = {}
    for key, value in module.state_dict(keep_vars=True).items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{name}.{key} is a {type(value).__name__}; only tensors can be saved")
        tensors[f"{name}.{plain_name(key)}"] = value
    return tensors
