"""A LoRA layer's base product and low-rank terms in one call of the operator, as far as that gives what PEFT gives.

Letters: M tokens, K in_features, N out_features, r LoRA rank, s directions. PEFT computes base(x), then for every active
adapter dropout, two products and a sum, each over all of x or y; here that is one pass. What cannot join is told by
`base_refusal` (the base layer is called by itself, the terms are added to its output) and `refusal` (nothing is fused).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from loradash.base_layers import computes_plainly
from loradash_kernels import dash_linear, low_rank_update
from loradash_kernels.arguments import autocast_dtype

PLAIN_TENSORS = frozenset({Tensor, nn.Parameter, nn.parameter.Buffer})
"""Types of tensors that kernels read: a subclass may hold anything."""

_HALVES = frozenset({torch.float16, torch.bfloat16})
_FLOATS = frozenset({torch.float32, torch.float64}) | _HALVES


class Term(NamedTuple):
    """scaling · (x̃ Aᵀ Bᵀ + bias) + Σ_i Δσ_i (x̃ · v_i) u_iᵀ, with x̃ = dropout(x): what one adapter adds to a layer."""

    lora_a: Tensor  # (r, K)
    lora_b: Tensor  # (N, r)
    scaling: float | Tensor  # a tensor of one element, or a number
    dropout_p: float = 0.0
    bias: Tensor | None = None  # (N,), B's own
    dash_u: Tensor | None = None  # (N, s)
    dash_vt: Tensor | None = None  # (s, K)
    dash_sigma: Tensor | None = None  # (s,)


def refusal(x: Tensor, terms: Sequence[Term], casts_input: bool = True) -> str | None:
    """Why no kernel should compute these terms on x, or None. `casts_input`: is x to be cast to the adapters' dtype?"""
    if type(x) not in PLAIN_TENSORS:
        return f"the input is a {type(x).__name__}"
    if x.layout is not torch.strided or x.dim() == 0 or x.dtype not in _FLOATS:
        return f"the input is {x.layout} {x.dtype} of shape {tuple(x.shape)}"
    autocast, device, features = autocast_dtype(x), x.device, x.shape[-1]
    dtype = _computed_in(x, autocast)
    for term in terms:
        if term.dropout_p >= 1.0:
            return "a dropout of 1"
        few = term.bias is None and term.dash_u is None
        for tensor in term[:2] if few else (*term[:2], *term[4:]):
            if tensor is None:
                continue
            if type(tensor) not in PLAIN_TENSORS:
                return f"a weight of an adapter is a {type(tensor).__name__}"
            if tensor.device != device:
                return f"an adapter is on {tensor.device}, the input on {device}"
            if tensor.dtype != dtype and not _casts_to(tensor.dtype, dtype):
                return f"an adapter is {tensor.dtype}, the layer computes in {dtype}"
        if term.lora_a.shape[-1] != features:
            return f"the input has {features} features, an adapter takes {term.lora_a.shape[-1]}"
        if not casts_input and autocast is None and term.lora_a.dtype != x.dtype:
            return f"casting of the input is switched off, an adapter is {term.lora_a.dtype}, the input {x.dtype}"
    return None


def base_refusal(x: Tensor, base: nn.Module) -> str | None:
    """Why a base layer must be called by itself for this x, or None: its product can be the operator's. x passed `refusal`."""
    kind = type(base)
    if kind not in (nn.Linear, Conv1D) and not computes_plainly(base):
        return f"the base layer is a {kind.__module__}.{kind.__qualname__}, which computes in a way of its own"
    if "forward" in base.__dict__:
        return "the base layer's forward was replaced"
    if is_hooked(base):
        return "the base layer has hooks"
    weight, bias = base._parameters.get("weight"), base._parameters.get("bias")
    if type(weight) not in PLAIN_TENSORS or (bias is not None and type(bias) not in PLAIN_TENSORS):
        return f"the base layer's weight is a {type(weight).__name__}"
    assert weight is not None
    if weight.requires_grad and torch.is_grad_enabled():
        return "the base layer's weight trains"
    autocast = autocast_dtype(x)
    dtype = _computed_in(x, autocast)
    for tensor in (weight,) if bias is None else (weight, bias):
        if _computed_in(tensor, autocast) != dtype or tensor.device != x.device:
            return f"the base layer is {tensor.dtype} on {tensor.device}, the input {x.dtype} on {x.device}"
    return None


# The classes of an adapter's parts whose calls compute their formula and nothing else.
_PRODUCT, _DROPOUT = (nn.Linear,), (nn.Dropout, nn.Identity)
_OWN = {"weight", "bias"}


def parts_refusal(lora_a: nn.Module, lora_b: nn.Module, dropout: nn.Module) -> str | None:
    """Why an adapter's parts must be called as modules, or None where their tensors say all that calling them does."""
    for module, kinds in ((lora_a, _PRODUCT), (lora_b, _PRODUCT), (dropout, _DROPOUT)):
        if type(module) not in kinds or is_hooked(module) or "forward" in module.__dict__:
            part = "the dropout" if kinds is _DROPOUT else "lora_A or lora_B"
            if type(module) not in kinds:
                return f"{part} is a {type(module).__name__}"
            return f"{part} has hooks" if is_hooked(module) else f"the forward of {part} was replaced"
    for module in (lora_a, lora_b):
        if not module._parameters.keys() >= _OWN:
            return "the weights of lora_A or lora_B are parts of another parameter"
    return None


def is_hooked(module: nn.Module) -> bool:
    """Does calling a module run more than its forward?"""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def computed_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a layer computes on x: that of x, or autocast's."""
    return _computed_in(x, autocast_dtype(x))


def _computed_in(t: Tensor, autocast: torch.dtype | None) -> torch.dtype:
    """The dtype in which a product with t is taken."""
    return t.dtype if autocast is None or t.dtype == torch.float64 else autocast


def _casts_to(adapter: torch.dtype, dtype: torch.dtype) -> bool:
    """May kernels that compute in `dtype` read adapters of this one? Float32 beside 16 bits is what PEFT makes by default;
    float64 says that somebody wants the digits, and one kind of 16 bits has no room for the other."""
    if adapter == torch.float64 or adapter not in _FLOATS:
        return False
    return not (adapter in _HALVES and dtype in _HALVES)


def with_base(x: Tensor, base: nn.Module, terms: Sequence[Term]) -> Tensor:
    """The base product and the terms of the first dropout in one call, those of further ones after it."""
    weight: Tensor = base._parameters["weight"]  # type: ignore[assignment]
    if weight.requires_grad:
        # Without gradients, see `base_refusal`.
        weight = weight.detach()
    if type(base) is not nn.Linear and isinstance(base, Conv1D):
        weight = weight.t()
    first, *others = _grouped(terms)
    y = dash_linear(
        x,
        weight,
        _summed_bias(base._parameters["bias"], terms, x.dtype),
        lora_a=first.lora_a,
        lora_b=first.lora_b,
        dash_u=first.dash_u,
        dash_vt=first.dash_vt,
        dash_sigma=first.dash_sigma,
        scaling=first.scaling,  # type: ignore[arg-type]
        dropout_p=first.dropout_p,
    )
    return _updated(y, x, others)


def beside_base(y: Tensor, x: Tensor, terms: Sequence[Term]) -> Tensor:
    """The output y (..., N) of a base layer plus the terms, in the dtype of y, which may be another than that of x."""
    dtype = y.dtype
    if dtype != x.dtype and autocast_dtype(x) is None:
        common = torch.promote_types(dtype, x.dtype)
        x, y = x.to(common), y.to(common)
    bias = _summed_bias(None, terms, y.dtype)
    if bias is not None:
        y = y + bias
    return _updated(y, x, _grouped(terms)).to(dtype)


def _updated(y: Tensor, x: Tensor, terms: Sequence[Term]) -> Tensor:
    for term in terms:
        y = low_rank_update(
            y,
            x,
            lora_a=term.lora_a,
            lora_b=term.lora_b,
            dash_u=term.dash_u,
            dash_vt=term.dash_vt,
            dash_sigma=term.dash_sigma,
            scaling=term.scaling,  # type: ignore[arg-type]
            dropout_p=term.dropout_p,
        )
    return y


def _grouped(terms: Sequence[Term]) -> list[Term]:
    """One term for each dropout, in order, with a number for its scaling."""
    if len(terms) == 1 and not isinstance(terms[0].scaling, Tensor):
        return [terms[0]]
    groups: dict[float, list[Term]] = {}
    for term in terms:
        groups.setdefault(term.dropout_p, []).append(term)
    return [_joined(group, p) for p, group in groups.items()]


def _joined(terms: list[Term], dropout_p: float) -> Term:
    """Several terms as one of their ranks together. Scalings that differ go into B, as ratios where they are numbers: those
    of two powers of two round nothing."""
    first = terms[0].scaling
    common = first if not isinstance(first, Tensor) and first != 0 else 1.0
    scaled = [_times(t.lora_b, t.scaling, common) for t in terms]
    if len(terms) == 1:
        return terms[0]._replace(lora_b=scaled[0], scaling=common, dropout_p=dropout_p)
    dashed = [t for t in terms if t.dash_u is not None]
    return Term(
        torch.cat([t.lora_a for t in terms]),
        torch.cat(scaled, 1),
        common,
        dropout_p,
        None,
        torch.cat([t.dash_u for t in dashed], 1) if dashed else None,  # type: ignore[misc]
        torch.cat([t.dash_vt for t in dashed]) if dashed else None,  # type: ignore[misc]
        torch.cat([t.dash_sigma for t in dashed]) if dashed else None,  # type: ignore[misc]
    )


def _times(b: Tensor, scaling: float | Tensor, common: float) -> Tensor:
    if isinstance(scaling, Tensor):
        return b * scaling
    return b if scaling == common else b * (scaling / common)


def _summed_bias(bias: Tensor | None, terms: Sequence[Term], dtype: torch.dtype) -> Tensor | None:
    """The base layer's bias (N,) with those of B, each times its scaling; a sum is in `dtype`."""
    total = bias
    for term in terms:
        if term.bias is not None:
            added = term.bias * term.scaling
            total = added if total is None else total + added
    return total if total is bias or total is None else total.to(dtype)
