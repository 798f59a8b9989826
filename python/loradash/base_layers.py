"""Base layers: which give their weight to `DashLinear`, which are kept whole inside it, which are refused; W as a matrix."""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

ROWS = 1024  # of the identity at a time
_PLAIN = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_HOOKS = (
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks",
    "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks",
)  # fmt: skip
# What a subclass may define and still be what its parent class is; any other name is something that code outside may use.
_TRIFLES = ("__init__", "__module__", "__qualname__", "__doc__", "__annotations__", "extra_repr", "reset_parameters")

Treatment = Literal["adopted", "kept whole"]


def is_linear(module: nn.Module) -> bool:
    """nn.Linear and its subclasses, and transformers' Conv1D (weight (K, N)) and its own."""
    return isinstance(module, nn.Linear) or _conv1d(module) is not None


def is_transposed(module: nn.Module) -> bool:
    """Is the weight stored as (K, N)?"""
    return not isinstance(module, nn.Linear) and _conv1d(module) is not None


def _conv1d(module: nn.Module) -> type | None:
    """transformers' Conv1D among the classes of a module, without importing transformers."""
    classes = type(module).__mro__
    return next((c for c in classes if c.__name__ == "Conv1D" and c.__module__ == "transformers.pytorch_utils"), None)


def treatment(module: nn.Module) -> Treatment:
    """What `DashLinear` does with a linear layer.

    "adopted": takes its weight and bias, where its forward is nn.Linear's (or Conv1D's) own and nothing hangs on it.
    "kept whole": calls the layer itself and adds the low-rank terms, for a subclass with a forward of its own, a
    quantised weight, hooks, parametrizations, a patched forward (offloading).

    Raises TypeError for what is no linear layer, ValueError where neither can be right: not initialised, sharded.
    """
    if not is_linear(module):
        raise TypeError(f"wanted nn.Linear or transformers' Conv1D, got {type(module).__name__}")
    weight = module._parameters.get("weight")
    if weight is not None and is_lazy(weight):
        raise ValueError(f"{type(module).__name__} has no weight yet; run the model once before adapting it")
    if any(is_sharded(p) for p in module.parameters()):
        raise ValueError(
            f"{type(module).__name__} is sharded (DTensor); adapt the model first, then fully_shard or parallelize it"
        )
    return "adopted" if is_plain(module) else "kept whole"


def is_plain(module: nn.Module) -> bool:
    """Does the layer compute x Wᵀ + b with a floating weight of its own, and nothing else?"""
    return (
        computes_plainly(module) and not any(getattr(module, name, None) for name in _HOOKS) and not _has_more(module)
    )


def _has_more(module: nn.Module) -> bool:
    """Is there state, or code in a subclass, beside those of nn.Linear (or Conv1D), that would go with the module?"""
    own = nn.Linear if isinstance(module, nn.Linear) else _conv1d(module)
    between = [c for c in type(module).__mro__ if own is not None and issubclass(c, own) and c is not own]
    code = {name for c in between for name in vars(c)} - set(_TRIFLES)
    return bool(code or module._buffers or module._modules or set(module._parameters) - {"weight", "bias"})


def computes_plainly(module: nn.Module) -> bool:
    """`is_plain`, but for hooks."""
    own = nn.Linear if isinstance(module, nn.Linear) else _conv1d(module)
    weight = module._parameters.get("weight")
    return (
        own is not None
        and type(module).forward is own.forward  # type: ignore[attr-defined]
        and type(module).__call__ is nn.Module.__call__
        and "forward" not in module.__dict__
        and not hasattr(module, "parametrizations")
        and type(weight) is nn.Parameter
        and weight.dtype in _PLAIN
        and weight.dim() == 2
    )


def is_quantised(weight: Any) -> bool:
    """Is a weight something else than plain floating numbers (bitsandbytes, torchao, ...)?"""
    if not isinstance(weight, Tensor):
        return False
    return weight.dtype not in _PLAIN or type(weight).dequantize is not Tensor.dequantize


def is_sharded(t: Tensor) -> bool:
    """Is a tensor one of torch.distributed's, of which this process holds a part (DTensor)?"""
    return hasattr(t, "device_mesh")


def whole(t: Tensor) -> Tensor:
    """A detached tensor, gathered where it is sharded: then every process must call this."""
    return t.full_tensor().detach() if is_sharded(t) else t.detach()  # type: ignore[attr-defined]


def write_shard(weight: Tensor, values: Tensor) -> None:
    """Writes a whole tensor into a sharded one: every process its own part."""
    from torch.distributed.tensor import distribute_tensor

    shard: Any = weight
    shard.copy_(distribute_tensor(values, shard.device_mesh, shard.placements))


def features(module: nn.Module) -> tuple[int, int]:
    """(K, N) of a linear layer. Raises ValueError for one that does not tell."""
    names = ("nx", "nf") if is_transposed(module) else ("in_features", "out_features")
    k, n = (getattr(module, name, None) for name in names)
    if not isinstance(k, int) or not isinstance(n, int):
        raise ValueError(f"{type(module).__name__} does not tell its {' and '.join(names)}: {k}, {n}")
    return k, n


def compute_device(module: nn.Module) -> torch.device:
    """Where a layer's outputs are: its weight's device, or the one that accelerate brings an offloaded weight to."""
    hook = module.__dict__.get("_hf_hook")
    device = getattr(hook, "execution_device", None)
    return torch.device(device) if device is not None else cast(Tensor, module.weight).device


@torch.no_grad()
def weight_of(module: nn.Module) -> Tensor:
    """The W (N, K) that a linear layer multiplies with; of one that computes in its own way, a new tensor every time.

    There it is the layer's products with the identity, less that with zero: whatever the format is, this is the W of
    its own outputs. Its hooks do not see these calls, unless the layer is called in a way of its own.
    """
    weight = cast(Tensor, module.weight)
    if computes_plainly(module) and not weight.is_meta:
        return weight.t() if is_transposed(module) else weight
    k, _ = features(module)
    device, dtype = compute_device(module), _input_dtype(module)
    call = module.forward if type(module).__call__ is nn.Module.__call__ else module
    with torch.autocast(device.type, enabled=False):
        offset = call(torch.zeros(1, k, dtype=dtype, device=device))
        columns = [
            call(torch.eye(min(ROWS, k - k0), k, dtype=dtype, device=device).roll(k0, -1)) - offset
            for k0 in range(0, k, ROWS)
        ]
    return torch.cat(columns).t()


def can_take_update(module: nn.Module) -> bool:
    """Is adding to a layer's weight adding to its products? Of one with a forward of its own, its products tell."""
    weight = module._parameters.get("weight")
    if type(weight) is not nn.Parameter or weight.dtype not in _PLAIN or weight.dim() != 2:
        return False
    if computes_plainly(module):
        return True
    own = weight.t() if is_transposed(module) else weight
    rounding = 2 * torch.finfo(weight.dtype).eps
    return torch.allclose(weight_of(module).double(), own.double(), rtol=rounding, atol=rounding)


def _input_dtype(module: nn.Module) -> torch.dtype:
    """Of inputs that a layer takes: its weight's where that is a plain one, else float32, which quantised layers take."""
    dtype = cast(Tensor, module.weight).dtype
    return dtype if dtype in _PLAIN else torch.float32
