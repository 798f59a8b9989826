"""`patch`: models built with the authors' classes, on our operator; reversible."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast, get_args

import torch
from torch import nn

from ...base_layers import is_linear, treatment
from ...model import wrapper_of
from ...quantised import is_quantised
from ...state import STATE, plain_name
from .kinds import CrMrLayer, DropInLayer, LoralibLayer, SdgHost, SdgLayer, adopt, has_hooks, release
from .layers import AuthorsLayer, Semantics
from .merged import NAME, MergedLayer, adopt_merged, hindrance, is_merged_linear, release_merged
from .run import attach, hosts_of, one_of

_ADAPTER_NAMES = ("lora_A", "lora_B", "lora_embedding_A", "lora_index")


@dataclass(frozen=True)
class PatchReport:
    """What `patch` did.

    Attributes:
        patched: layers that run on our operator, with the authors' code base whose class they are.
        plain: MergedLinear, which runs on it too, and has no directions: what loradash does with adapters leaves it out, and its
            own state dict has it.
        left: layers with adapters that keep the authors' code, or another's, each with the reason.
    """

    patched: dict[str, str]
    left: dict[str, str]
    plain: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"{len(self.patched)} layers patched, {len(self.left)} left as they are"]
        if self.plain:
            lines.append(f"  {len(self.plain)} {NAME} patched, which have no directions: {', '.join(self.plain[:4])}")
        return "\n".join([*lines, *(f"  {name}: {reason}" for name, reason in self.left.items())])


def patch(model: nn.Module, semantics: Semantics = "loradash", step: int | None = None) -> PatchReport:
    """Lets the LoRA-Dash layers of the authors' classes compute by our operator, before or after launch.

    Parameters, state dict and isinstance stay as they are, so an optimizer goes on. `unpatch` gives the classes back. With
    "loradash" the model then takes a `DashSchedule`, `save_adapter`, `load_adapter`, `merge` and `export_lora`; with
    "authors" it counts forward calls and launches itself, and takes all of these but the schedule.

    Args:
        semantics: whose rules hold from now on (the table of this package says how they differ).
        step: optimizer steps taken, where forward calls were not steps (accumulation, evaluation); by default their count.
            For "loradash" alone.

    Returns a report. Raises ValueError, with nothing changed: no layer of theirs that can be patched; a model patched or
    adapted already, or inside DistributedDataParallel or FSDP; dropout or warmup that differ between layers and, for
    "loradash", their phase or count.
    """
    if semantics not in get_args(Semantics):
        raise ValueError(f"semantics must be one of {get_args(Semantics)}, got {semantics!r}")
    if step is not None and (type(step) is not int or step < 0):
        raise ValueError(f"step must be an integer of at least 0, got {step!r}")
    if step is not None and semantics == "authors":
        raise ValueError(
            "step is for semantics='loradash': layers of semantics='authors' count forward calls, as theirs do"
        )
    # torch.compile traces the changed module anew.
    model = model._modules.get("_orig_mod") or model
    for name, module in model.named_modules():
        if wrapper := wrapper_of(module):
            raise ValueError(f"{name or 'the model'} is wrapped in {wrapper}; patch comes before it")
        if isinstance(module, DropInLayer):
            raise ValueError(f"{name or 'the model'} is a Linear of this package, which runs on the operator as it is")
        if STATE in module.__dict__ or isinstance(module, AuthorsLayer | SdgHost | MergedLayer):
            raise ValueError(f"{name or 'the model'} is adapted already; unpatch(model) first")
    found, left = _sorted_layers(model)
    plain = {name: module for name, module in _with_adapters(model) if is_merged_linear(module) and name not in left}
    if not found and not plain:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(left.items())[:4])
        raise ValueError(f"no LoRA-Dash layer of the authors' classes can be patched{': ' if reasons else ''}{reasons}")
    if found and semantics == "loradash":
        _check_phases({name: module for name, (module, _) in found.items()}, step)
    layers: dict[str, AuthorsLayer] = {}
    try:
        for name, (module, kind) in found.items():
            layers[name] = adopt(module, kind, semantics, name)
        if layers:
            attach(model, layers, step)
    except BaseException:
        for name in layers:
            release(found[name][0])
        raise
    for module in plain.values():
        adopt_merged(module)
    return PatchReport({name: kind.dialect for name, (_, kind) in found.items()}, left, tuple(plain))


def unpatch(model: nn.Module) -> None:
    """Gives the layers that `patch` took their own classes back, in the phase and with the FLAG that they have by now.

    Raises ValueError for a model that has none.
    """
    model = model._modules.get("_orig_mod") or model
    hosts, plain = hosts_of(model), [module for module in model.modules() if isinstance(module, MergedLayer)]
    dashed = STATE in model.__dict__ and not any(isinstance(module, DropInLayer) for module in hosts)
    if not (hosts and dashed) and not plain:
        raise ValueError("the model was not patched: patch(model) comes before unpatch(model), on the same model")
    for layer in plain:
        release_merged(layer)
    if hosts and dashed:
        for module in hosts:
            release(module)
        delattr(model, STATE)


def _sorted_layers(model: nn.Module) -> tuple[dict[str, tuple[nn.Module, type[AuthorsLayer]]], dict[str, str]]:
    """Layers that can be patched, with their kind, and those that cannot, with the reason."""
    found: dict[str, tuple[nn.Module, type[AuthorsLayer]]] = {}
    left: dict[str, str] = {}
    for name, module in _with_adapters(model):
        kind = _kind(module)
        if is_merged_linear(module):
            reason = _hindrance(module, None) or hindrance(module)
            left |= {name: f"{NAME}: {reason}"} if reason else {}
            continue
        reason = "no LoRA-Dash in this class" if kind is None else _hindrance(module, kind)
        if kind is None or reason:
            left[name] = f"{type(module).__name__}: {reason}"
        else:
            found[name] = module, kind
    return found, left


def _with_adapters(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        own = {**module._parameters, **module._modules}
        if any(own.get(part) is not None for part in _ADAPTER_NAMES):
            yield plain_name(name), module


def _kind(module: nn.Module) -> type[AuthorsLayer] | None:
    """Which of the authors' layers a module is: by the name of its class and what it holds."""
    if type(module).__name__ != "Linear":
        return None
    parameters, modules = module._parameters, module._modules
    if isinstance(module, nn.Linear):
        if {"lora_A", "lora_B", "lora_index", "weight_u_top", "weight_vt_top"} <= parameters.keys():
            return LoralibLayer
        if {"lora_A", "lora_B", "lora_index"} <= modules.keys() and {"lora_w_u", "lora_w_vt"} <= parameters.keys():
            return CrMrLayer
    if {"lora_A", "lora_B", "lora_index", "lora_w_u", "lora_w_vt", "base_layer"} <= modules.keys():
        return SdgLayer if any(True for _ in cast(nn.Module, modules["lora_index"]).children()) else None
    return None


def _hindrance(module: Any, kind: type[AuthorsLayer] | None) -> str | None:
    """Why a layer of theirs cannot be patched; None where it can."""
    if "forward" in module.__dict__:
        return "its forward was replaced"
    for name, part in module.named_modules():
        # The layer's own hooks run as before.
        if name and name != "base_layer" and has_hooks(part):
            return f"hooks on {name} would not run"
    if module.merged:
        return "merged; unmerge it first"
    if kind is SdgLayer:
        return _hindrance_of_sdg(module)
    if is_quantised(module.weight) or module.weight.requires_grad:
        return "its weight is quantised" if is_quantised(module.weight) else "its weight trains"
    return None


def _hindrance_of_sdg(module: Any) -> str | None:
    if len(module.lora_A) != 1:
        return f"{len(module.lora_A)} adapters ({', '.join(module.lora_A)}); one can be patched"
    if any(module.use_dora.values()) or any(getattr(module, "lora_use_map", {}).values()):
        return "DoRA or LoMAP"
    base = module.base_layer
    if not is_linear(base):
        return f"its base layer is a {type(base).__name__}"
    try:
        treatment(base)
    except ValueError as error:
        return str(error)
    return "its weight trains" if base.weight.requires_grad else None


@torch.no_grad()
def _check_phases(modules: Mapping[str, Any], step: int | None) -> None:
    """A schedule launches all layers at one step: they must be in one phase, at one count."""
    vectors = {name: m.weight_u_top if hasattr(m, "weight_u_top") else m.lora_w_u for name, m in modules.items()}
    launched = {
        name: m.warmup < m.FLAG or any(bool(u.any()) for u in _tensors(vectors[name])) for name, m in modules.items()
    }
    one_of(launched, "launched", "semantics='authors' takes layers in different phases")
    if step is None and not any(launched.values()):
        one_of({name: m.FLAG for name, m in modules.items()}, "FLAG", "say how many optimizer steps were taken: step=")


def _tensors(holder: Any) -> list[torch.Tensor]:
    return [holder] if isinstance(holder, torch.Tensor) else list(holder.values())
