"""The layers of a model: which give their weight to `DashLinear`, which are kept whole inside it, which are refused."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from .distributed import is_dtensor
from .formats import is_packed_bitnet, unready
from .slices import LinearSlice
from .zero import whole_shape

Treatment = Literal["adopted", "kept whole"]

PLAIN = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""Dtypes whose numbers are the weight's own, not codes for others."""

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
# A subclass may define these and still be what its parent class is; any other name is something that code outside may use.
_TRIFLES = {"__init__", "__module__", "__qualname__", "__doc__", "__annotations__", "extra_repr", "reset_parameters"}


def is_linear(module: nn.Module) -> bool:
    """Is it nn.Linear, transformers' Conv1D (whose weight is (K, N)), a subclass of either, or transformers' BitLinear?"""
    return _kind(module) not in (None, *CONVOLUTIONS) or is_packed_bitnet(module)


def is_pointwise(module: nn.Module) -> bool:
    """Is it a linear layer over channels that `DashConvolution` can adapt?"""
    return isinstance(module, CONVOLUTIONS) and pointwise_refusal(module) is None


def pointwise_refusal(module: nn.Module) -> str | None:
    """Why a module that is no linear layer is none over channels either, or none that can be adapted; or None.

    Such a layer is nn.Conv1d, nn.Conv2d or nn.Conv3d with a kernel of one element, one group and no padding; any stride.
    """
    if not isinstance(module, CONVOLUTIONS):
        return f"{type(module).__name__}({module.extra_repr()}) is no linear layer"
    padding = module.padding if isinstance(module.padding, str) else max(module.padding)
    if max(module.kernel_size) > 1 or module.groups > 1 or padding not in (0, "valid", "same"):
        return f"{type(module).__name__}({module.extra_repr()}) is no linear layer over channels"
    weight = module._parameters.get("weight")
    if weight is not None and is_lazy(weight):
        return f"{type(module).__name__} has no weight yet; run the model once before adapting it"
    if any(is_dtensor(p) for p in module.parameters()):
        return f"{type(module).__name__} is sharded (DTensor); adapt the model first"
    return None if computes_plainly(module) else f"{type(module).__name__} computes in a way of its own"


def is_transposed(module: nn.Module) -> bool:
    """Is the weight stored as (K, N)?"""
    return _kind(module) not in (None, nn.Linear, *CONVOLUTIONS)


def _kind(module: nn.Module) -> type[nn.Module] | None:
    """nn.Linear, transformers' Conv1D or a convolution, whichever a module is; Conv1D is found by its name, without importing
    transformers."""
    for kind in (nn.Linear, *CONVOLUTIONS):
        if isinstance(module, kind):
            return kind
    classes = type(module).__mro__
    return next((c for c in classes if c.__name__ == "Conv1D" and c.__module__ == "transformers.pytorch_utils"), None)


def features(module: nn.Module) -> tuple[int, int]:
    """(K, N) of a linear layer. Raises ValueError for one that does not tell."""
    names = ("nx", "nf") if is_transposed(module) else ("in_features", "out_features")
    names = ("in_channels", "out_channels") if isinstance(module, CONVOLUTIONS) else names
    k, n = (getattr(module, name, None) for name in names)
    if not isinstance(k, int) or not isinstance(n, int):
        raise ValueError(f"{type(module).__name__} does not tell its {' and '.join(names)}: {k}, {n}")
    return k, n


_PLANNED = " (of transformers: loaded without tp_plan, adapted, divided by loradash.tensor_parallel.parallelize)"


def treatment(module: nn.Module) -> Treatment:
    """What `DashLinear` does with a linear layer.

    "adopted": takes its weight and bias, where its forward is nn.Linear's (or Conv1D's) own and nothing hangs on it.
    "kept whole": calls the layer itself and adds the low-rank terms, for a subclass with a forward of its own, a
    quantised weight, hooks, parametrizations, a patched forward (offloading).

    Raises TypeError for what is no linear layer, ValueError where neither can be right: not initialised, not quantised yet,
    without a gradient, sharded.
    """
    problem = unready(module)
    if problem:
        raise ValueError(problem)
    if not is_linear(module):
        raise TypeError(f"wanted nn.Linear or transformers' Conv1D, got {type(module).__name__}")
    weight = module._parameters.get("weight")
    if weight is not None and is_lazy(weight):
        raise ValueError(f"{type(module).__name__} has no weight yet; run the model once before adapting it")
    if any(is_dtensor(p) for p in module.parameters()):
        raise ValueError(
            f"{type(module).__name__} is sharded (DTensor); adapt the model first, then fully_shard or parallelize it{_PLANNED}"
        )
    # Older releases of transformers leave each process its part as a plain tensor, and hooks.
    if getattr(module, "_hf_tp_plan", None) is not None:
        raise ValueError(
            f"{type(module).__name__} is divided over processes by a tp_plan; adapt the model first{_PLANNED}"
        )
    hooked = any(getattr(module, name, None) for name in _HOOKS)
    return "adopted" if computes_plainly(module) and not hooked and not _has_more(module) else "kept whole"


def computes_plainly(module: nn.Module) -> bool:
    """Does the layer, its hooks aside, compute x Wᵀ + b (or its convolution) with a floating weight of its own?"""
    holder = module.whole if isinstance(module, LinearSlice) else module
    kind, weight = _kind(module), holder._parameters.get("weight")
    return (
        has_plain_code(module)
        and type(weight) is nn.Parameter
        and weight.dtype in PLAIN
        and (len(whole_shape(weight)) == 2 or kind in CONVOLUTIONS)
    )


def has_plain_code(module: nn.Module) -> bool:
    """Does its class compute what nn.Linear, Conv1D or a convolution does, whatever its weight is (sharded, quantised)?"""
    kind = _kind(module)
    return (
        kind is not None
        and type(module).forward is kind.forward
        and type(module).__call__ is nn.Module.__call__
        and "forward" not in module.__dict__
        and not hasattr(module, "parametrizations")
    )


def _has_more(module: nn.Module) -> bool:
    """Is there state, or code in a subclass, beside those of nn.Linear (or Conv1D), that would go with the module?"""
    kind = _kind(module)
    between = [c for c in type(module).__mro__ if kind is not None and issubclass(c, kind) and c is not kind]
    code = {name for c in between for name in vars(c)} - _TRIFLES
    return bool(code or module._buffers or module._modules or set(module._parameters) - {"weight", "bias"})
