"""A trained model as a plain LoRA in PEFT's file format: the same outputs in PEFT, or an error that says why not."""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from loradash_kernels.files import replace_file

from .bypass import child_at, mended_children
from .distributed import gathered, reshard
from .linear import DashLinear
from .model import disable
from .state import dash_layers, dash_state, plain_name, unwrap
from .targets import module_tensors, trainable_modules

PREFIX = "base_model.model."
"""PeftModel puts it before every name."""

_TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}
_HEADS = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}
"""For a task, the modules that PEFT keeps as a whole beside the adapter, whether they were trained or not."""

_EXPERTS = {"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"}
"""Beside fused experts PEFT takes layers of these names for the experts themselves."""


class _Unfaithful(ValueError):
    """PEFT would not give the model's outputs."""


def export_lora(model: nn.Module, path: str | os.PathLike) -> Path:
    """Folds the dash term into a LoRA of rank r + s, in PEFT's file format: served by whatever serves LoRA.

    scaling · B A + U diag(Δσ) Vᵀ = [scaling · B | U diag(Δσ)] [A; Vᵀ], with PEFT's own scaling set to 1. All layers get the
    same rank, short ones zeros, in float32. Modules that train as a whole go along as `modules_to_save`, and so does a head
    that PEFT keeps as a whole for the task of a transformers model, with its adapters merged.

    Sharded parameters are gathered: every process must call this, with a folder of its own or the same.

    Args:
        path: a folder; gets adapter_config.json and adapter_model.safetensors.

    Raises ValueError, before anything is written, where PEFT has no place for what was trained: biases (train_bias), a module
    under two names, a module trained as a whole whose weight is tied to another's, layers whose parent reads their weight,
    names that PEFT cannot tell apart.
    """
    root, config = unwrap(model), dash_state(model).config
    if config.train_bias:
        raise ValueError("export_lora cannot carry trained biases (train_bias=True); merge(model) and save the weights")
    reshard(model)
    merged = any(layer.merged for layer in dash_layers(model).values())
    # A merged weight is a tensor of its own: which modules share it shows only after unmerging.
    with disable(model) if merged else contextlib.nullcontext():
        layout, tensors = _contents(model, root)
    settings = _settings(root, layout, config.dropout)
    folder = Path(path)
    replace_file(folder / "adapter_model.safetensors", lambda f: save_file(tensors, f, metadata={"format": "pt"}))
    replace_file(folder / "adapter_config.json", lambda f: _write_text(f, json.dumps(settings, indent=2)))
    return folder


def _write_text(path: str, text: str) -> None:
    Path(path).write_text(text, encoding="utf-8")


@dataclass(frozen=True)
class _View:
    """A model as PEFT will meet it: without our wrappers, layers as plain ones.

    modules: every module under every name. adapted, whole: those that carry what was trained, under their first names.
    """

    modules: dict[str, nn.Module]
    adapted: dict[str, DashLinear]
    whole: dict[str, nn.Module]

    def names_of(self, module: nn.Module) -> list[str]:
        return [name for name, m in self.modules.items() if m is module]

    def first_names(self) -> list[str]:
        """One name a module, as PEFT walks them for LoRA."""
        first: dict[int, str] = {}
        for name, module in self.modules.items():
            first.setdefault(id(module), name)
        return list(first.values())


def _view(model: nn.Module, root: nn.Module) -> _View:
    modules: dict[str, nn.Module] = {}
    layer: str | None = None
    for wrapped, module in root.named_modules(remove_duplicate=False):
        name = plain_name(wrapped)
        # A layer's own parts follow it.
        if layer is not None and name.startswith(f"{layer}."):
            continue
        # A wrapper and what it wraps have one plain name; the latter comes second and stays.
        modules[name] = module
        if isinstance(module, DashLinear):
            layer = name
    adapted = dash_layers(model)
    whole = {n: modules[n] for n in trainable_modules(model, dash_state(model).config)}
    return _View(modules, adapted, whole)


@dataclass(frozen=True)
class _Layout:
    """How the parts of an adapter are named in PEFT's files."""

    task: str | None
    adapted: dict[str, DashLinear]
    whole: dict[str, nn.Module]
    targets: list[str] | str


def _contents(model: nn.Module, root: nn.Module) -> tuple[_Layout, dict[str, Tensor]]:
    """The layout and the tensors: for the model's task where PEFT then serves it faithfully, else for none."""
    view = _view(model, root)
    _refuse_parents(view)
    _refuse_ties(view)
    _warn_of_tied_targets(view)
    task = _task(root)
    if task is not None:
        # Without a task PEFT touches no head: the second try.
        with contextlib.suppress(_Unfaithful):
            layout = _layout(view, task)
            return layout, _tensors(layout)
    layout = _layout(view, None)
    return layout, _tensors(layout)


def _task(root: nn.Module) -> str | None:
    """PEFT's task type of a transformers model that takes tokens, by the name of its class."""
    config = getattr(root, "config", None)
    task = next((t for end, t in _TASKS.items() if type(root).__name__.endswith(end)), None)
    if task is None or not hasattr(config, "model_type"):
        return None
    # PEFT's model for a task passes input_ids on, which audio and vision models do not know.
    if next(iter(inspect.signature(root.forward).parameters), None) != "input_ids":
        return None
    if task in ("CAUSAL_LM", "SEQ_2_SEQ_LM") and not hasattr(root, "prepare_inputs_for_generation"):
        return None
    if task == "SEQ_2_SEQ_LM" and not getattr(config, "is_encoder_decoder", False):
        return None
    return task


def _refuse_parents(view: _View) -> None:
    fused = any("gate_up_proj" in module._parameters for module in view.modules.values())
    passed = {
        id(child_at(parent, path)): parent for parent in view.modules.values() for path in mended_children(parent)
    }
    for name, layer in view.adapted.items():
        if not name:
            raise _Unfaithful("the model is itself the adapted layer; PEFT adapts layers inside of a model")
        if id(layer) in passed:
            raise _Unfaithful(
                f"{name}: {type(passed[id(layer)]).__name__} reads the weight of this layer, so PEFT's adapter would be "
                "passed by; merge(model) and save the weights"
            )
        if fused and name.rpartition(".")[2] in _EXPERTS:
            raise _Unfaithful(
                f"{name}: PEFT takes a layer of this name for a part of the model's fused experts; exclude it by "
                "exclude_modules, or merge(model) and save the weights"
            )


def _refuse_ties(view: _View) -> None:
    inside = {id(m) for module in view.whole.values() for m in module.modules()}
    outside = {_memory(p): key for module, key, p in _parameters(view) if id(module) not in inside}
    for name, module in view.whole.items():
        for key, parameter in module.named_parameters():
            other = outside.get(_memory(parameter))
            if other is not None:
                raise _Unfaithful(
                    f"{name}.{key} was trained and is tied to {other}; PEFT would give {name} a copy of its own and leave "
                    "the other as it was"
                )


def _warn_of_tied_targets(view: _View) -> None:
    users: dict[Any, set[int]] = {}
    for module, _, parameter in _parameters(view):
        users.setdefault(_memory(parameter), set()).add(id(module))
    frozen = {name: layer.weight if layer.base is None else layer.base.weight for name, layer in view.adapted.items()}
    tied = [name for name, weight in frozen.items() if len(users.get(_memory(weight), ())) > 1]  # type: ignore[arg-type]
    if tied:
        warnings.warn(
            f"loradash: the weight of {', '.join(tied[:4])} is tied to another module's: serve the exported adapter beside the "
            "model; PEFT's merge_and_unload would change both",
            stacklevel=4,
        )


def _parameters(view: _View) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """Every parameter with the module that holds it and its full name."""
    for name, module in view.modules.items():
        for key, parameter in module.named_parameters(name, recurse=isinstance(module, DashLinear)):
            yield module, key, parameter


def _memory(tensor: Tensor) -> Any:
    """Equal for parameters that are one, or two over the same memory."""
    if hasattr(tensor, "full_tensor") or type(tensor) not in (Tensor, nn.Parameter) or not tensor.data_ptr():
        return id(tensor)
    return tensor.data_ptr(), tensor.shape


def _refuse_second_names(view: _View, modules: Iterable[nn.Module]) -> None:
    """PEFT replaces a module in one place: the others would keep the frozen one."""
    for module in modules:
        names = view.names_of(module)
        places = {(id(view.modules[name.rpartition(".")[0]]), name.rpartition(".")[2]) for name in names}
        if len(places) > 1:
            raise _Unfaithful(
                f"{' and '.join(names)} are one shared module, and PEFT adapts it under one name only; merge(model) and "
                "save the weights"
            )


def _layout(view: _View, task: str | None) -> _Layout:
    heads = _HEADS.get(task or "", ())
    first = view.first_names()
    kept = {name: view.modules[name] for name in first if (PREFIX + name).endswith(heads)} if heads else {}
    whole = _outermost({**view.whole, **kept})
    adapted = {n: layer for n, layer in view.adapted.items() if not any(_within(n, w) for w in whole)}
    if not adapted:
        raise _Unfaithful("PEFT needs an adapted layer outside of the modules that are kept whole")
    _refuse_second_names(view, (*adapted.values(), *whole.values()))
    for name, module in whole.items():
        _refuse_mistaken(view, name, module)
    reached = {name for name in _peft_keys(view) if name.endswith(heads)} if heads else set()
    lost = reached - {PREFIX + name for module in whole.values() for name in view.names_of(module)}
    if lost:
        raise _Unfaithful(
            f"PEFT keeps {', '.join(heads)} whole for {task}, which also matches {', '.join(sorted(lost))}"
        )
    return _Layout(task, adapted, whole, _target_names(first, adapted, [*whole, *heads]))


def _within(name: str, module: str) -> bool:
    return name == module or name.startswith(f"{module}.") or not module


def _outermost(modules: dict[str, nn.Module]) -> dict[str, nn.Module]:
    return {n: m for n, m in modules.items() if not any(_within(n, other) for other in modules if other != n)}


def _peft_keys(view: _View) -> list[str]:
    """Names in which PEFT looks for modules_to_save: of all modules, and of the LoRA layers that it has made before."""
    made = (
        "base_layer",
        *(f"lora_{part}" for part in ("dropout", "A", "B", "embedding_A", "embedding_B", "magnitude_vector")),
    )
    inner = [f"{name}.{part}{default}" for name in view.adapted for part in made for default in ("", ".default")]
    return ["", "base_model", *((PREFIX + name).rstrip(".") for name in (*view.modules, *inner))]


def _refuse_mistaken(view: _View, name: str, module: nn.Module) -> None:
    """PEFT matches modules_to_save with the ends of names: is this module the only one?"""
    wanted = {PREFIX + n for n in view.names_of(module)}
    others = sorted(key.removeprefix(PREFIX) for key in _peft_keys(view) if key.endswith(name) and key not in wanted)
    if others:
        raise _Unfaithful(f"{name} trained as a whole, and PEFT cannot tell it from {', '.join(others[:4])}: rename it")


def _target_names(names: Sequence[str], adapted: Iterable[str], saved: Iterable[str]) -> list[str] | str:
    """target_modules for PEFT: the names where it, which takes them for suffixes too, finds these layers alone; otherwise one
    regular expression."""
    wanted = sorted(adapted)
    for entry in saved:
        try:
            # The expression is PEFT's own, which takes the name for a pattern.
            hidden = [name for name in wanted if re.match(rf"(^|.*\.){entry}($|\..*)", name)]
        except re.error as error:
            raise _Unfaithful(f"{entry} trained as a whole, and PEFT cannot read its name ({error})") from error
        if hidden:
            raise _Unfaithful(f"{entry} is kept as a whole, and to PEFT its name means {', '.join(hidden[:4])} too")
    suffixes = tuple(f".{name}" for name in wanted)
    if {name for name in names if name in wanted or name.endswith(suffixes)} == set(wanted):
        return wanted
    return "|".join(re.escape(name) for name in wanted)


@torch.no_grad()
def _folded(layer: DashLinear) -> tuple[Tensor, Tensor]:
    """A (R, K) and B (N, R) of the whole update, float32, R = r + s."""
    lora_a, lora_b, sigma, u, vt = (
        gathered(t).float() for t in (layer.lora_a, layer.lora_b, layer.dash_sigma, layer.dash_u, layer.dash_vt)
    )
    return torch.cat((lora_a, vt)), torch.cat((layer.scaling * lora_b, u * sigma), 1)


def _tensors(layout: _Layout) -> dict[str, Tensor]:
    """Everything under PEFT's names, on the CPU."""
    rank = _rank(layout)
    tensors: dict[str, Tensor] = {}
    for name, layer in layout.adapted.items():
        a, b = (t.cpu() for t in _folded(layer))
        more = rank - a.shape[0]
        tensors[f"{PREFIX}{name}.lora_A.weight"] = nn.functional.pad(a, (0, 0, 0, more)).contiguous()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = nn.functional.pad(b, (0, more)).contiguous()
    for name, module in layout.whole.items():
        tensors |= {PREFIX + key: t for key, t in _plain_tensors(name, module).items()}
    return tensors


def _rank(layout: _Layout) -> int:
    return max(layer.lora_a.shape[0] + layer.dash_sigma.shape[0] for layer in layout.adapted.values())


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
        raise _Unfaithful(f"{prefix}weight cannot take the update")
    try:
        return layer.merged_weight().cpu().contiguous().clone()
    except ValueError as error:
        raise _Unfaithful(str(error)) from error


def _settings(root: nn.Module, layout: _Layout, dropout: float) -> dict[str, Any]:
    """adapter_config.json."""
    rank, about = _rank(layout), getattr(root, "config", None)
    transformers = hasattr(about, "model_type")
    mapping = {"base_model_class": type(root).__name__, "parent_library": type(root).__module__}
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
        "lora_dropout": dropout,
        "bias": "none",
        "use_rslora": False,
        "fan_in_fan_out": any(layer.transposed for layer in layout.adapted.values()),
        "inference_mode": True,
    }
