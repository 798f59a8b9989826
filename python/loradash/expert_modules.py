"""Modules of experts that can have adapters: which parameters they multiply with, and how their forward goes.

They are transformers' and are found without importing it: those whose forward is that of its `use_experts_implementation`,
and Llama 4's. The functions here compute what their forward computes, with every product left to `module.product`
(`loradash.experts.DashExperts`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from loradash_kernels import expert_offsets

from .base_layers import PLAIN
from .distributed import is_sharded

HOW = "_loradash_how"
"""The attribute of the class of an adapted module that holds its `Kind`."""

# What the function has that transformers' decorator makes every forward of.
_FREE_VARIABLE = "experts_interface"
_LLAMA4 = ("transformers.models.llama4.modeling_llama4", "Llama4TextExperts.forward")
# What transformers computes alike; its other implementations are kernels that read the weights themselves.
_IMPLEMENTATIONS = (None, "eager", "batched_mm", "grouped_mm")


class Kind(NamedTuple):
    """A kind of experts module. compute: its forward, with adapters. parameters: those that it multiplies with.

    transposed: are they stored as (E, K, N)?
    """

    compute: Callable[..., Tensor]
    parameters: tuple[str, ...]
    transposed: bool


def kind_of(module: nn.Module) -> Kind | None:
    """How a module computes its experts; None for one that is not known. Found without importing transformers."""
    known = getattr(type(module), HOW, None)
    if known is not None:
        return known
    forward = type(module).forward
    code = getattr(forward, "__code__", None)
    if code is not None and _FREE_VARIABLE in code.co_freevars and hasattr(module, "is_transposed"):
        up = "gate_up_proj" if getattr(module, "has_gate", True) else "up_proj"
        return Kind(_routed, (up, "down_proj"), bool(module.is_transposed))
    if (forward.__module__, forward.__qualname__) == _LLAMA4:
        return Kind(_every_expert, ("gate_up_proj", "down_proj"), True)
    return None


def refusal(module: nn.Module, parameter: str) -> str | None:
    """Why a parameter of a module cannot have adapters, or None."""
    tensor, kind = module._parameters[parameter], kind_of(module)
    if tensor is None:
        return "is None"
    if is_lazy(tensor):
        return "has no values yet; run the model once before adapting it"
    if kind is None:
        return (
            f"is a parameter {tuple(tensor.shape)} of {type(module).__name__}, whose forward is not known: experts are those of "
            "transformers 5 (use_experts_implementation) and of Llama 4; layers are adapted by target_modules"
        )
    if parameter not in kind.parameters or tensor.dim() != 3:
        return f"has shape {tuple(tensor.shape)}; of {type(module).__name__} {' and '.join(kind.parameters)} can be adapted"
    if is_sharded(tensor):
        return "is sharded (DTensor); adapt the model first, then fully_shard it"
    if type(tensor) is not nn.Parameter or tensor.dtype not in PLAIN:
        return (
            f"is a {type(tensor).__name__} of {tensor.dtype}; wanted a plain parameter of {', '.join(map(str, PLAIN))}"
        )
    if "forward" in module.__dict__:
        return f"belongs to a {type(module).__name__} whose forward was replaced"
    return call_refusal(module)


def call_refusal(module: Any) -> str | None:
    """Why this module, as it is set up, cannot run with adapters, or None."""
    if getattr(module, "_is_expert_parallel", False):
        return "is shared out over processes (expert parallelism), for which there are no adapters"
    implementation = getattr(getattr(module, "config", None), "_experts_implementation", None)
    if implementation not in _IMPLEMENTATIONS:
        return (
            f"is computed by experts_implementation={implementation!r}, which adapters would be passed by; set "
            "'eager', 'batched_mm' or 'grouped_mm'"
        )
    return None


def stacked_names(model: nn.Module) -> Iterator[str]:
    """The parameters of a model that could have adapters, by their names in it."""
    for name, module in model.named_modules():
        for key in module._parameters:
            if refusal(module, key) is None:
                yield f"{name}.{key}".lstrip(".")


def _routed(self: Any, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """The forward of transformers' experts: hidden (T, H), the chosen experts (T, top k) and their weights (T, top k)."""
    chosen = index.shape[-1]
    order, offsets = expert_offsets(index.reshape(-1), self.num_experts)
    x = hidden[order // chosen]
    gated = getattr(self, "has_gate", True)
    up = self.product("gate_up_proj" if gated else "up_proj", x, offsets)
    inner = self._apply_gate(up) if gated else self.act_fn(up)
    y = self.product("down_proj", inner, offsets)
    if getattr(self, "has_post_expert_norm", False):
        y = self.post_expert_norm(y)
    y = y * weights.reshape(-1)[order].unsqueeze(-1)
    # Back in the order of the tokens, where a sum over each one's experts adds in the same order every time.
    back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    return y[back].view(hidden.shape[0], chosen, y.shape[1]).sum(1).to(hidden.dtype)


def _every_expert(self: Any, hidden: Tensor) -> Tensor:
    """Llama 4's forward: hidden (E T, H), all tokens for expert 0, then all for expert 1, ...; zeros where not chosen."""
    experts = self.gate_up_proj.shape[0]
    x = hidden.reshape(-1, self.hidden_size)
    offsets = torch.arange(1, experts + 1, device=x.device) * (x.shape[0] // experts)
    gate, up = self.product("gate_up_proj", x, offsets).chunk(2, dim=-1)
    return self.product("down_proj", up * self.act_fn(gate), offsets).view(-1, self.hidden_size)
