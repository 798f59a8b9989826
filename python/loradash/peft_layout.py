"""What PEFT makes of a model: the names under which it finds layers, and where it would not give the model's outputs."""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .bypass import child_at, mended_children
from .experts import ExpertParameter
from .linear import DashLinear
from .slices import LinearSlice
from .split import SplitLinear
from .state import dash_state, experts_of, linears_of, own_layers, plain_name
from .targets import trainable_modules

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

EXPERT_NAMES = {"gate", "gate_proj", "up_proj", "gate_up_proj", "down_proj", "w1", "w2", "w3"}
"""Beside fused experts PEFT takes layers of these names for the experts themselves."""


class Unfaithful(ValueError):
    """PEFT would not give the model's outputs."""


@dataclass(frozen=True)
class View:
    """A model as PEFT will meet it: without our wrappers, layers as plain ones.

    modules: every module under every name. adapted, whole: those that carry what was trained, under their first names.
    experts: adapted parameters of experts, likewise.
    """

    modules: dict[str, nn.Module]
    adapted: dict[str, DashLinear | SplitLinear]
    whole: dict[str, nn.Module]
    experts: dict[str, ExpertParameter]

    def names_of(self, module: nn.Module) -> list[str]:
        return [name for name, m in self.modules.items() if m is module]

    def first_names(self) -> list[str]:
        """One name a module, as PEFT walks them for LoRA."""
        first: dict[int, str] = {}
        for name, module in self.modules.items():
            first.setdefault(id(module), name)
        return list(first.values())


def view_of(model: nn.Module, root: nn.Module) -> View:
    """The view of an adapted model; root is its `unwrap`."""
    modules: dict[str, nn.Module] = {}
    layer: str | None = None
    for wrapped, module in root.named_modules(remove_duplicate=False):
        name = plain_name(wrapped)
        # A layer's own parts follow it.
        if layer is not None and name.startswith(f"{layer}."):
            continue
        # A wrapper and what it wraps have one plain name; the latter comes second and stays.
        modules[name] = module
        if isinstance(module, DashLinear | SplitLinear):
            layer = name
    layers = own_layers(model)
    adapted: dict[str, DashLinear | SplitLinear] = {}
    for name, one in linears_of(layers).items():
        if not isinstance(one.base, LinearSlice):
            adapted[name] = one
    for name, module in modules.items():
        # Parts of a fused layer are one LoRA of that.
        if isinstance(module, SplitLinear) and module.adapted() and module not in adapted.values():
            adapted[name] = module
    whole = {n: modules[n] for n in trainable_modules(model, dash_state(model).config)}
    return View(modules, adapted, whole, experts_of(layers))


@dataclass(frozen=True)
class Layout:
    """How the parts of an adapter are named in PEFT's files."""

    task: str | None
    adapted: dict[str, DashLinear | SplitLinear]
    whole: dict[str, nn.Module]
    targets: list[str] | str
    experts: dict[str, ExpertParameter]

    @property
    def rank(self) -> int:
        """The largest r + s of a layer: PEFT gets one rank for all."""
        layers = [*self.adapted.values(), *self.experts.values()]
        return max(m.rank if isinstance(m, SplitLinear) else m.config.r + m.dash_vt.shape[-2] for m in layers)


def task_of(root: nn.Module) -> str | None:
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


def refuse_parents(view: View) -> None:
    """Raises Unfaithful for layers that PEFT would not adapt where they are: their parent passes them by, or they are mistaken
    for experts."""
    fused = any("gate_up_proj" in module._parameters for module in view.modules.values())
    passed = {
        id(child_at(parent, path)): parent for parent in view.modules.values() for path in mended_children(parent)
    }
    for name, layer in view.adapted.items():
        if not name:
            raise Unfaithful("the model is itself the adapted layer; PEFT adapts layers inside of a model")
        if id(layer) in passed:
            raise Unfaithful(
                f"{name}: {type(passed[id(layer)]).__name__} reads the weight of this layer, so PEFT's adapter would be "
                "passed by; merge(model) and save the weights"
            )
        if fused and name.rpartition(".")[2] in EXPERT_NAMES:
            raise Unfaithful(
                f"{name}: PEFT takes a layer of this name for a part of the model's fused experts; exclude it by "
                "exclude_modules, or merge(model) and save the weights"
            )


def refuse_ties(view: View) -> None:
    """Raises Unfaithful where a module that trained as a whole shares a parameter with another."""
    inside = {id(m) for module in view.whole.values() for m in module.modules()}
    outside = {_memory(p): key for module, key, p in _parameters(view) if id(module) not in inside}
    for name, module in view.whole.items():
        for key, parameter in module.named_parameters():
            other = outside.get(_memory(parameter))
            if other is not None:
                raise Unfaithful(
                    f"{name}.{key} was trained and is tied to {other}; PEFT would give {name} a copy of its own and leave "
                    "the other as it was"
                )


def warn_of_tied_targets(view: View) -> None:
    """Warns, for the caller of export_lora, where the frozen weight of an adapted layer is another module's too."""
    users: dict[Any, set[int]] = {}
    for module, _, parameter in _parameters(view):
        users.setdefault(_memory(parameter), set()).add(id(module))
    frozen = {name: layer.weight if layer.base is None else layer.base.weight for name, layer in view.adapted.items()}
    frozen |= {name: whole.weight for name, whole in view.experts.items()}
    tied = [name for name, weight in frozen.items() if len(users.get(_memory(weight), ())) > 1]  # type: ignore[arg-type]
    if tied:
        warnings.warn(
            f"loradash: the weight of {', '.join(tied[:4])} is tied to another module's: serve the exported adapter beside the "
            "model; PEFT's merge_and_unload would change both",
            stacklevel=4,
        )


def _parameters(view: View) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """Every parameter with the module that holds it and its full name."""
    for name, module in view.modules.items():
        for key, parameter in module.named_parameters(name, recurse=isinstance(module, DashLinear)):
            yield module, key, parameter


def _memory(tensor: Tensor) -> Any:
    """Equal for parameters that are one, or two over the same memory."""
    if hasattr(tensor, "full_tensor") or type(tensor) not in (Tensor, nn.Parameter) or not tensor.data_ptr():
        return id(tensor)
    return tensor.data_ptr(), tensor.shape


def _refuse_second_names(view: View, modules: Iterable[nn.Module]) -> None:
    """PEFT replaces a module in one place: the others would keep the frozen one."""
    for module in modules:
        names = view.names_of(module)
        places = {(id(view.modules[name.rpartition(".")[0]]), name.rpartition(".")[2]) for name in names}
        if len(places) > 1:
            raise Unfaithful(
                f"{' and '.join(names)} are one shared module, and PEFT adapts it under one name only; merge(model) and "
                "save the weights"
            )


def layout_for(view: View, task: str | None) -> Layout:
    """How PEFT's files name this adapter when they are served for a task. Raises Unfaithful where PEFT would read them
    otherwise."""
    heads = _HEADS.get(task or "", ())
    first = view.first_names()
    kept = {name: view.modules[name] for name in first if (PREFIX + name).endswith(heads)} if heads else {}
    whole = _outermost({**view.whole, **kept})
    adapted = {n: layer for n, layer in view.adapted.items() if not any(_within(n, w) for w in whole)}
    if not adapted and not view.experts:
        raise Unfaithful("PEFT needs an adapted layer outside of the modules that are kept whole")
    _refuse_experts(view, whole)
    _refuse_second_names(view, (*adapted.values(), *(e.module for e in view.experts.values()), *whole.values()))
    for name, module in whole.items():
        _refuse_mistaken(view, name, module)
    reached = {name for name in _peft_keys(view) if name.endswith(heads)} if heads else set()
    lost = reached - {PREFIX + name for module in whole.values() for name in view.names_of(module)}
    if lost:
        raise Unfaithful(
            f"PEFT keeps {', '.join(heads)} whole for {task}, which also matches {', '.join(sorted(lost))}"
        )
    return Layout(task, adapted, whole, _target_names(first, adapted, [*whole, *heads]), view.experts)


def _refuse_experts(view: View, whole: Iterable[str]) -> None:
    """Raises Unfaithful for experts that PEFT would not adapt as they are."""
    names = [f"{name}.{key}" for name, module in view.modules.items() for key in module._parameters]
    for name, layer in view.experts.items():
        inside = [module for module in whole if _within(name, module)]
        if inside:
            raise Unfaithful(
                f"{name} is adapted within {inside[0]}, which is kept whole; merge(model) and save the weights"
            )
        if layer.experts == 1 and layer.how.transposed:
            raise Unfaithful(
                f"{name} has one expert, stored as (1, K, N), which PEFT adds (N, K) to; merge(model) and save it"
            )
        others = [other for other in names if other != name and other.endswith(f".{name}")]
        if others:
            raise Unfaithful(f"PEFT takes the name of {name} for {others[0]} too; merge(model) and save the weights")


def _within(name: str, module: str) -> bool:
    return name == module or name.startswith(f"{module}.") or not module


def _outermost(modules: dict[str, nn.Module]) -> dict[str, nn.Module]:
    return {n: m for n, m in modules.items() if not any(_within(n, other) for other in modules if other != n)}


def _peft_keys(view: View) -> list[str]:
    """Names in which PEFT looks for modules_to_save: of all modules, and of the LoRA layers that it has made before."""
    made = (
        "base_layer",
        *(f"lora_{part}" for part in ("dropout", "A", "B", "embedding_A", "embedding_B", "magnitude_vector")),
    )
    inner = [f"{name}.{part}{default}" for name in view.adapted for part in made for default in ("", ".default")]
    return ["", "base_model", *((PREFIX + name).rstrip(".") for name in (*view.modules, *inner))]


def _refuse_mistaken(view: View, name: str, module: nn.Module) -> None:
    """PEFT matches modules_to_save with the ends of names: is this module the only one?"""
    wanted = {PREFIX + n for n in view.names_of(module)}
    others = sorted(key.removeprefix(PREFIX) for key in _peft_keys(view) if key.endswith(name) and key not in wanted)
    if others:
        raise Unfaithful(f"{name} trained as a whole, and PEFT cannot tell it from {', '.join(others[:4])}: rename it")


def _target_names(names: Sequence[str], adapted: Iterable[str], saved: Iterable[str]) -> list[str] | str:
    """target_modules for PEFT: the names where it, which takes them for suffixes too, finds these layers alone; otherwise one
    regular expression."""
    wanted = sorted(adapted)
    for entry in saved:
        try:
            # The expression is PEFT's own, which takes the name for a pattern.
            hidden = [name for name in wanted if re.match(rf"(^|.*\.){entry}($|\..*)", name)]
        except re.error as error:
            raise Unfaithful(f"{entry} trained as a whole, and PEFT cannot read its name ({error})") from error
        if hidden:
            raise Unfaithful(f"{entry} is kept as a whole, and to PEFT its name means {', '.join(hidden[:4])} too")
    suffixes = tuple(f".{name}" for name in wanted)
    if {name for name in names if name in wanted or name.endswith(suffixes)} == set(wanted):
        return wanted
    return "|".join(re.escape(name) for name in wanted)
