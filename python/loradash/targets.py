"""The modules of a model that a `DashConfig` names: layers to adapt, and modules that train as a whole."""

from __future__ import annotations

from torch import Tensor, nn

from .base_layers import is_linear
from .config import DashConfig, matches, unmatched, without_match
from .expert_modules import refusal, stacked_names
from .linear import DashLinear
from .state import plain_name, unwrap


def target_layers(model: nn.Module, config: DashConfig) -> dict[str, nn.Module]:
    """The layers that these settings adapt, by plain name, adapted by others already or not. Not what is part of another one."""
    found: dict[str, nn.Module] = {}
    inside: set[nn.Module] = set()
    # A layer comes before its own parts.
    for name, module in _linear_layers(model).items():
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
    found = {plain_name(name): m for name, m in model.named_modules() if isinstance(m, DashLinear) or is_linear(m)}
    inside = {part for m in found.values() if isinstance(m, DashLinear) for part in m.modules() if part is not m}
    return {name: m for name, m in found.items() if m not in inside}


def _trains_whole(name: str, config: DashConfig) -> bool:
    parts = name.split(".")
    return any(matches(".".join(parts[: i + 1]), config.trainable_modules) for i in range(len(parts)))


def check_patterns(model: nn.Module, config: DashConfig) -> None:
    """Raises ValueError where the settings adapt nothing, or a pattern of theirs matches nothing in the model."""
    linears = _linear_layers(model)
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
    problems = unmatched(config, [*linears, *stacked], [plain_name(name) for name, _ in model.named_modules()])
    if problems:
        raise ValueError("; ".join(problems))


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
    """The state of a module that trains as a whole, under its name. Raises ValueError for state that is no tensor."""
    tensors: dict[str, Tensor] = {}
    for key, value in module.state_dict().items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{name}.{key} is a {type(value).__name__}; only tensors can be saved")
        tensors[f"{name}.{plain_name(key)}"] = value
    return tensors
