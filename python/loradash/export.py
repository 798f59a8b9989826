"""A trained model as a plain LoRA in PEFT's file format: the same outputs in PEFT, or an error that says why not."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from loradash_kernels.files import replace_bytes, replace_file

from .adapters import as_active
from .distributed import gathered, reshard
from .experts import ExpertParameter
from .linear import DashLinear
from .model import disable
from .peft_layout import (
    PREFIX,
    Layout,
    Unfaithful,
    layout_for,
    refuse_parents,
    refuse_ties,
    task_of,
    view_of,
    warn_of_tied_targets,
)
from .split import SplitLinear
from .state import OwnLayer, all_layers, dash_state, host_of, plain_name, unwrap
from .targets import module_tensors
from .units import whole


def export_lora(model: nn.Module, path: str | os.PathLike, adapter: str | None = None) -> Path:
    """Folds the dash term into a LoRA of rank r + s, in PEFT's file format: served by whatever serves LoRA.

    scaling · B A + U diag(Δσ) Vᵀ = [scaling · B | U diag(Δσ)] [A; Vᵀ], with PEFT's own scaling set to 1. All layers get the
    same rank, short ones zeros, in float32. Modules that train as a whole go along as `modules_to_save`, and so does a head
    that PEFT keeps as a whole for the task of a transformers model, with its adapters merged. Experts' parameters become
    PEFT's target_parameters, which take no dropout: lora_dropout is 0 then.

    Sharded parameters are gathered: every process must call this, with a folder of its own or the same.

    Args:
        path: a folder; gets adapter_config.json and adapter_model.safetensors.
        adapter: a name of `adapter_names(model)`; None takes the active one.

    Raises ValueError, before anything is written, where PEFT has no place for what was trained: biases (train_bias), a module
    under two names, a module trained as a whole whose weight is tied to another's, layers whose parent reads their weight,
    names that PEFT cannot tell apart.
    """
    if adapter is not None:
        with as_active(model, adapter):
            return export_lora(model, path)
    host = host_of(model)
    if host is not None:
        host.export_lora(Path(path))
        return Path(path)
    root, config = unwrap(model), dash_state(model).config
    if config.train_bias:
        raise ValueError("export_lora cannot carry trained biases (train_bias=True); merge(model) and save the weights")
    reshard(model)
    merged = any(layer.merged for layer in all_layers(model).values())
    # A merged weight is a tensor of its own: which modules share it shows only after unmerging.
    with disable(model) if merged else contextlib.nullcontext(), whole(model):
        layout, tensors = _contents(model, root)
    settings = _settings(root, layout, config.dropout)
    folder = Path(path)
    replace_file(folder / "adapter_model.safetensors", lambda f: save_file(tensors, f, metadata={"format": "pt"}))
    replace_bytes(folder / "adapter_config.json", json.dumps(settings, indent=2).encode())
    return folder


def _contents(model: nn.Module, root: nn.Module) -> tuple[Layout, dict[str, Tensor]]:
    """The layout and the tensors: for the model's task where PEFT then serves it faithfully, else for none."""
    view = view_of(model, root)
    refuse_parents(view)
    refuse_ties(view)
    warn_of_tied_targets(view)
    task = task_of(root)
    if task is not None:
        # Where this fails the model is exported without a task: PEFT then touches no head.
        with contextlib.suppress(Unfaithful):
            layout = layout_for(view, task)
            return layout, _tensors(layout)
    layout = layout_for(view, None)
    return layout, _tensors(layout)


@torch.no_grad()
def _folded(layer: OwnLayer | SplitLinear) -> tuple[Tensor, Tensor]:
    """A (..., R, K) and B (..., N, R) of the whole update, float32, R = r + s."""
    if isinstance(layer, SplitLinear):
        return layer.folded()
    lora_a, lora_b, sigma, u, vt = (
        gathered(t).float() for t in (layer.lora_a, layer.lora_b, layer.dash_sigma, layer.dash_u, layer.dash_vt)
    )
    return torch.cat((lora_a, vt), -2), torch.cat((layer.scaling * lora_b, u * sigma.unsqueeze(-2)), -1)


def _tensors(layout: Layout) -> dict[str, Tensor]:
    """Everything under PEFT's names, on the CPU."""
    tensors: dict[str, Tensor] = {}
    for name, layer in layout.adapted.items():
        a, b = (t.cpu() for t in _folded(layer))
        more = layout.rank - a.shape[0]
        for key, factor in (("A", nn.functional.pad(a, (0, 0, 0, more))), ("B", nn.functional.pad(b, (0, more)))):
            # PEFT's factors of a convolution are convolutions.
            tensors[f"{PREFIX}{name}.lora_{key}.weight"] = factor.reshape(
                *factor.shape, *layer.unit_kernel
            ).contiguous()
    for name, stacked in layout.experts.items():
        tensors |= _expert_tensors(name, stacked, layout)
    for name, module in layout.whole.items():
        tensors |= {PREFIX + key: t for key, t in _plain_tensors(name, module).items()}
    return tensors


def _expert_tensors(name: str, whole: ExpertParameter, layout: Layout) -> dict[str, Tensor]:
    """A and B of an experts' parameter as PEFT has them: (E R, K), expert by expert, and (N, R E), rank by rank.

    PEFT wraps a module once a parameter, the first one innermost: its tensors are behind as many names `base_layer` as there
    are wrappers around it. What the module does not say to be stored as (E, K, N) it takes for (E, N, K).
    """
    a, b = (t.cpu() for t in _folded(whole))
    more = layout.rank - a.shape[1]
    a, b = nn.functional.pad(a, (0, 0, 0, more)), nn.functional.pad(b, (0, more))
    if whole.how.transposed and not getattr(whole.module, "is_transposed", False):
        a, b = b.mT, a.mT
    targeted = {other.parameter for other in layout.experts.values() if other.module is whole.module}
    order = [key for key in whole.module._parameters if key in targeted]
    around = len(order) - 1 - order.index(whole.parameter)
    place = f"{PREFIX}{name.rpartition('.')[0]}.{'base_layer.' * around}"
    return {
        f"{place}lora_A.weight": a.reshape(-1, a.shape[2]).contiguous(),
        f"{place}lora_B.weight": b.permute(1, 2, 0).reshape(b.shape[1], -1).contiguous(),
    }


def _plain_tensors(name: str, module: nn.Module) -> dict[str, Tensor]:
    """The state of a module kept whole; adapted layers in it are merged."""
    tensors = {key: gathered(t).cpu().contiguous().clone() for key, t in module_tensors(name, module).items()}
    for inner, layer in module.named_modules():
        if not isinstance(layer, DashLinear):
            continue
        prefix = f"{name}.{plain_name(inner)}.".replace("..", ".")
        tensors = {key: t for key, t in tensors.items() if not key.startswith(prefix)}
        tensors[f"{prefix}weight"] = _merged_weight(prefix, layer)
        if layer.bias is not None:
            tensors[f"{prefix}bias"] = gathered(layer.bias).cpu().contiguous().clone()
    return tensors


def _merged_weight(prefix: str, layer: DashLinear) -> Tensor:
    if layer.base is not None:
        raise Unfaithful(f"{prefix}weight cannot take the update")
    try:
        return layer.merged_weight().cpu().contiguous().clone()
    except ValueError as error:
        raise Unfaithful(str(error)) from error


def _settings(root: nn.Module, layout: Layout, dropout: float) -> dict[str, Any]:
    """adapter_config.json."""
    rank, about = layout.rank, getattr(root, "config", None)
    transformers = hasattr(about, "model_type")
    mapping = {"base_model_class": type(root).__name__, "parent_library": type(root).__module__}
    experts = {"target_parameters": sorted(layout.experts)} if layout.experts else {}
    return {
        "peft_type": "LORA",
        "task_type": layout.task,
        "auto_mapping": mapping if transformers and layout.task is None else None,
        "base_model_name_or_path": getattr(about, "_name_or_path", None) or None,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": {},
        "alpha_pattern": {},
        "target_modules": layout.targets,
        "modules_to_save": sorted(layout.whole) or None,
        "lora_dropout": 0.0 if layout.experts else dropout,
        "bias": "none",
        "use_rslora": False,
        "fan_in_fan_out": any(layer.transposed for layer in layout.adapted.values()),
        "inference_mode": True,
        **experts,
    }
