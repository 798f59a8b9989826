"""Puts adapters into a model and finds them there."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from .config import DashConfig, matches
from .linear import DashLinear

STATE = "_loradash_state"


@dataclass
class DashState:
    """What a run must remember besides tensors; travels with the model and in the adapter file."""

    config: DashConfig
    step: int = 0  # optimizer steps taken
    dash_only: bool = False  # A and B are frozen


def dash_state(model: nn.Module) -> DashState:
    """The state that `apply_dash` left on a model. Raises ValueError where there is none."""
    state = getattr(unwrap(model), STATE, None)
    if state is None:
        raise ValueError("the model has no LoRA-Dash adapters; call apply_dash(model, config) first")
    return state


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside DistributedDataParallel or torch.compile."""
    while True:
        inner = getattr(model, "_orig_mod", None) or (model.module if hasattr(model, "module") else None)
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def dash_layers(model: nn.Module) -> dict[str, DashLinear]:
    """All adapted layers by name; a layer that occurs twice, under its first name."""
    return {name: m for name, m in unwrap(model).named_modules() if isinstance(m, DashLinear)}


def apply_dash(model: nn.Module, config: DashConfig | None = None) -> nn.Module:
    """Replaces linear layers by `DashLinear` around their own weights, in place, and freezes everything else.

    nn.Linear and transformers' Conv1D are adapted. A module that occurs twice becomes one adapted layer; a weight tied to
    another module's stays tied. Modules in `config.trainable_modules` keep training as they are.

    Returns the model. Raises ValueError if nothing matches or the model is adapted already; it is then unchanged.
    """
    config = config or DashConfig()
    if getattr(model, STATE, None) is not None:
        raise ValueError("the model has LoRA-Dash adapters already")
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"}
    chosen = {n: m for n, m in linears.items() if _is_target(n, config)}
    if not chosen:
        raise ValueError(
            f"target_modules={config.target_modules!r} matches none of the {len(linears)} linear layers: "
            f"{', '.join(list(linears)[:8])}{', ...' if len(linears) > 8 else ''}"
        )
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    adapted: dict[nn.Module, nn.Module] = {
        m: DashLinear.from_linear(m, config.for_module(n)) for n, m in chosen.items()
    }
    for parent in list(model.modules()):
        for child, module in parent._modules.items():  # named_children would skip a module's second name
            if module in adapted:
                parent._modules[child] = adapted[module]
    for module in trainable_modules(model, config).values():
        for parameter in module.parameters():
            parameter.requires_grad_(True)
    setattr(model, STATE, DashState(config))
    return model


def _is_target(name: str, config: DashConfig) -> bool:
    wanted = config.target_modules is None or matches(name, config.target_modules)
    return wanted and not matches(name, config.exclude_modules) and not _trains_whole(name, config)


def _trains_whole(name: str, config: DashConfig) -> bool:
    parts = name.split(".")
    return any(matches(".".join(parts[: i + 1]), config.trainable_modules) for i in range(len(parts)))


def trainable_modules(model: nn.Module, config: DashConfig) -> dict[str, nn.Module]:
    """The modules that train as a whole, outermost only."""
    found: dict[str, nn.Module] = {}
    for name, module in unwrap(model).named_modules():
        if matches(name, config.trainable_modules) and not any(name.startswith(f + ".") for f in found):
            found[name] = module
    return found


# --- switches --------------------------------------------------------------------------------------------------------


def merge(model: nn.Module) -> None:
    """Adds every layer's ΔW to its weight, for inference without adapters."""
    for layer in dash_layers(model).values():
        layer.merge()


def unmerge(model: nn.Module) -> None:
    """Undoes `merge`, bit for bit."""
    for layer in dash_layers(model).values():
        layer.unmerge()


@contextlib.contextmanager
def disable(model: nn.Module) -> Iterator[nn.Module]:
    """Within the block the model is the frozen base model. Merged layers are unmerged for its length."""
    layers = list(dash_layers(model).values())
    before = [(layer.enabled, layer.merged) for layer in layers]
    for layer in layers:
        layer.unmerge()
        layer.enabled = False
    try:
        yield model
    finally:
        for layer, (enabled, merged) in zip(layers, before, strict=True):
            layer.enabled = enabled
            if merged:
                layer.merge()


def dash_only(model: nn.Module) -> None:
    """From now on only Δσ trains: A and B are frozen. Raises ValueError before launch."""
    layers = dash_layers(model)
    waiting = [name for name, layer in layers.items() if not bool(layer.launched)]
    if waiting:
        raise ValueError(f"dash_only comes after launch; still in pre-launch: {', '.join(waiting[:4])}")
    for layer in layers.values():
        layer.lora_a.requires_grad_(False)
        layer.lora_b.requires_grad_(False)
    dash_state(model).dash_only = True


# --- summary ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Summary:
    """Counts of parameters."""

    layers: int
    adapters: int
    other_trainable: int
    total: int

    def __str__(self) -> str:
        trainable = self.adapters + self.other_trainable
        return (
            f"{self.layers} layers adapted; {trainable:,} of {self.total:,} parameters train "
            f"({100 * trainable / max(self.total, 1):.2f}%): {self.adapters:,} in adapters, {self.other_trainable:,} elsewhere"
        )


def summary(model: nn.Module) -> Summary:
    """How many parameters train, and where."""
    layers = dash_layers(model)
    ours = {id(p) for m in layers.values() for p in (m.lora_a, m.lora_b, m.dash_sigma)}
    parameters = list(unwrap(model).parameters())
    adapters = sum(p.numel() for p in parameters if id(p) in ours and p.requires_grad)
    other = sum(p.numel() for p in parameters if id(p) not in ours and p.requires_grad)
    return Summary(len(layers), adapters, other, sum(p.numel() for p in parameters))
