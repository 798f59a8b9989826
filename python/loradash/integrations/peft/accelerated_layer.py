"""PEFT's `lora.Linear` with a forward on the fused operator, which asks in every call whether that gives what PEFT's gives."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from peft.tuners.lora import variants
from peft.tuners.lora.layer import VARIANT_KWARG_KEYS
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from loradash_kernels import composite, explain_backend

from .fused import Term, base_refusal, beside_base, computed_dtype, parts_refusal, refusal, with_base

How = Literal["fused", "beside the base", "PEFT", "LORADASH"]


class Way(NamedTuple):
    """How a call runs, and why not in the way before: fused, the adapters alone fused, PEFT's own forward; a LORADASH
    layer runs its own, on the same operator."""

    how: How
    why: str = ""


FUSED = Way("fused")

CALLS = "_loradash_calls"
"""The attribute of an accelerated layer that holds its `Calls`."""


class Calls:
    """How many calls ran in which way. An object of its own: of a dict torch.compile would watch the length, and torch.export
    would put a copy in its place."""

    def __init__(self) -> None:
        self.ways: Counter[Way] = Counter()


listeners: list[Callable[[nn.Module, Way], None]] = []
"""Called with every layer and the way its call ran, but under torch.compile, which counts nothing."""

pefts_forward = LoraLinear.forward

# MiCA is plain LoRA that starts elsewhere and keeps B frozen.
_PLAIN_VARIANTS = tuple(filter(None, [getattr(variants, "MiCALinearVariant", None)]))

_TRACED = "tracing or exporting: the graph is to have PyTorch's operators"

# PEFT takes these itself, the base layer gets the others.
_TAKEN = frozenset({"adapter_names", *VARIANT_KWARG_KEYS})


class AcceleratedLinear(LoraLinear):
    """`lora.Linear` that computes on the fused operator where it can. Only an accelerated layer has this class."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        # Wrappers of an instance's forward keep it when the layer is given back.
        if CALLS not in self.__dict__:
            return pefts_forward(self, x, *args, **kwargs)
        return forward(self, x, *args, **kwargs)

    def _get_name(self) -> str:
        return LoraLinear.__name__


def forward(layer: LoraLinear, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """What `lora.Linear.forward` gives for a layer, on the fused operator where that is possible; counts the way."""
    terms = terms_of(layer)
    why = terms if isinstance(terms, str) else _refusal(layer, x, terms, kwargs)
    if why is not None:
        _count(layer, Way("PEFT", why))
        return pefts_forward(layer, x, *args, **kwargs)
    assert not isinstance(terms, str)
    base = layer._modules["base_layer"]
    assert base is not None
    further = {name: value for name, value in kwargs.items() if name not in _TAKEN} if kwargs else kwargs
    why = "further arguments go to the base layer" if args or further else base_refusal(x, base)
    if why is None:
        _count(layer, FUSED)
        return with_base(x, base, terms)
    _count(layer, Way("beside the base", why))
    return beside_base(base(x, *args, **further), x, terms)


def _count(layer: LoraLinear, way: Way) -> None:
    if torch.compiler.is_compiling():
        return
    calls = layer.__dict__.get(CALLS)
    if calls is not None:
        calls.ways[way] += 1
    for listener in listeners:
        listener(layer, way)


def terms_of(layer: LoraLinear) -> list[Term] | str:
    """The terms that the active adapters add to a layer, or the reason why PEFT must compute it."""
    if layer._disable_adapters:
        return "adapters are disabled"
    if layer.merged_adapters:
        return "merged"
    modules: Any = layer._modules
    all_a, all_b, dropouts = modules["lora_A"]._modules, modules["lora_B"]._modules, modules["lora_dropout"]._modules
    terms = []
    for name in layer.active_adapters:
        a = all_a.get(name)
        if a is None:
            continue
        variant = layer.lora_variant.get(name)
        if variant is not None and type(variant) not in _PLAIN_VARIANTS:
            return f"a variant of LoRA: {type(variant).__name__}"
        b, dropout = all_b[name], dropouts[name]
        why = parts_refusal(a, b, dropout)
        if why is not None:
            return why
        p = dropout.p if type(dropout) is nn.Dropout and dropout.training else 0.0
        b_own = b._parameters
        terms.append(Term(a._parameters["weight"], b_own["weight"], layer.scaling[name], p, b_own["bias"]))
    return terms or "no active adapter"


def _refusal(layer: LoraLinear, x: Tensor, terms: list[Term], kwargs: dict[str, Any]) -> str | None:
    if kwargs and kwargs.get("adapter_names") is not None:
        return "a mixed batch (adapter_names)"
    if torch.compiler.is_compiling():
        if torch.compiler.is_exporting():
            return _TRACED
    elif torch._C._is_tracing():
        return _TRACED
    elif composite.is_wanted():
        return "a transform of torch.func, or forward-mode differentiation"
    if _has_any_global_hook():
        return "hooks on all modules"
    why = refusal(x, terms, getattr(layer, "cast_input_dtype_enabled", True))
    return why or without_kernels(x.device, computed_dtype(x), sum([term.lora_a.shape[0] for term in terms]))


_unserved: dict[tuple[torch.device, torch.dtype, int], str | None] = {}


# A compiled graph holds the answer: it is the same in every call.
@torch.compiler.assume_constant_result
def without_kernels(device: torch.device, dtype: torch.dtype, width: int) -> str | None:
    """Why plain PyTorch, whose products PEFT would take too, had to compute such a layer of total rank `width`, or None."""
    key = (device, dtype, width)
    if key not in _unserved:
        choice = explain_backend(torch.empty(0, dtype=dtype, device=device), width=width)
        slow = choice.backend == "reference"
        _unserved[key] = f"no kernels for {dtype} on {device.type} at a rank of {width}" if slow else None
    return _unserved[key]


def standing(layer: LoraLinear) -> Way:
    """How a layer's calls will run as it stands, as far as that can be said without an input."""
    if "forward" in layer.__dict__:
        return Way("PEFT", "the layer's forward was replaced (offloading?)")
    terms = terms_of(layer)
    if isinstance(terms, str):
        return Way("PEFT", terms)
    base: Any = layer._modules["base_layer"]
    weight = layer.get_base_layer()._parameters.get("weight")
    dtype = weight.dtype if weight is not None and weight.is_floating_point() else terms[0].lora_a.dtype
    like = torch.empty(0, terms[0].lora_a.shape[-1], dtype=dtype, device=terms[0].lora_a.device)
    why = _refusal(layer, like, terms, {})
    if why is not None:
        return Way("PEFT", why)
    why = base_refusal(like, base)
    return FUSED if why is None else Way("beside the base", why)
