"""The public functions: check the arguments, flatten x to (M, K), call the operator."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from . import arguments, composite, sharded
from .autograd import DASH_LINEAR, LOW_RANK_UPDATE, Operator
from .random import draw_seed, dropout_threshold

_ARGUMENTS = ("x", "weight", "bias", "lora_a", "lora_b", "dash_u", "dash_vt", "dash_sigma")
_ARGUMENTS_OF_UPDATE = ("y", "x", *_ARGUMENTS[3:])


def dash_linear(
    x: Tensor,  # (..., K)
    weight: Tensor,  # (N, K)
    bias: Tensor | None = None,  # (N,)
    *,
    lora_a: Tensor,  # (r, K)
    lora_b: Tensor,  # (N, r)
    dash_u: Tensor | None = None,  # (N, s)
    dash_vt: Tensor | None = None,  # (s, K)
    dash_sigma: Tensor | None = None,  # (s,)
    scaling: float = 1.0,
    dropout_p: float = 0.0,
    training: bool = True,
    backend: str | None = None,
) -> Tensor:  # (..., N)
    """LoRA-Dash linear layer (Si et al., ICLR 2025, arXiv 2409.01035), base product included, in one operator.

    y = x Wᵀ + b + scaling · x̃ Aᵀ Bᵀ + Σ_i Δσ_i (x̃ · v_i) u_iᵀ, with x̃ = dropout(x) where `training`.

    Args:
        x: any number of leading dimensions, any strides; float32, bfloat16, float16 or float64.
        weight: frozen, in the dtype of x; a transposed view is taken as it is.
        bias: in the dtype of x; may require grad.
        lora_a, lora_b: trainable; of x's dtype or wider (gradients come in the adapter's own dtype).
        dash_u, dash_vt, dash_sigma: all three or none: left and right singular vectors of the chosen directions,
            frozen, and their trainable coordinates. Zero u and vt make the layer plain LoRA.
        scaling: alpha / r, or alpha / sqrt(r) for rsLoRA.
        dropout_p: probability in [0, 1), rounded to 1/65536; one mask, drawn from torch's generator, for both terms.
        backend: a name of `available_backends()`, which is obeyed or raises; None takes the first that can run
            (`explain_backend` tells which), or the one that was measured to be faster on this card.

    Under autocast x, weight and bias are cast to its dtype as `nn.functional.linear` casts them: not from float64. Under
    torch.func transforms and forward-mode differentiation the plain formula is computed in their place, without dropout.

    DTensors: where x is one, all are, of one mesh, and the layer is divided by its columns (N), its rows (K) or the batch, as
    their placements tell (`loradash_kernels.sharded` has the table). The result is a DTensor; partial sums for rows. Every
    process calls this, with one seed of torch's generator: the mask is that of the whole x.

    Raises:
        ValueError: a shape, dtype, layout, device or placement that does not fit, named; a weight, u or vt that requires
            grad; DTensors beside plain tensors; another subclass (quantised) that does not take the operator.
        RuntimeError: a requested backend that cannot run; dropout or a requested backend under a transform;
            differentiating the gradients again; processes that share a layer and draw different seeds.
    """
    dtype = arguments.autocast_dtype(x)
    if dtype is not None:
        x, weight, bias = arguments.autocast_base(x, weight, bias, dtype)
    adapters = (lora_a, lora_b, dash_u, dash_vt, dash_sigma)
    arguments.check_adapters(x, weight.shape, *adapters)
    arguments.check_base(x, weight, bias)
    threshold = _threshold(dropout_p, training)
    seed = whole = None
    if type(x) is not Tensor and sharded.is_distributed(x):
        tensors = dict(zip(_ARGUMENTS, (x, weight, bias, *adapters), strict=True))
        (x, weight, bias, lora_a, lora_b, dash_u, dash_vt, dash_sigma), seed, whole = sharded.split(threshold, tensors)
        adapters = (lora_a, lora_b, dash_u, dash_vt, dash_sigma)
    if composite.is_wanted():
        composite.refuse(threshold, backend)
        y = composite.dash_linear(x, weight, bias, *adapters, scaling)
        return y if whole is None else whole(y)
    if threshold and seed is None:
        seed = draw_seed(x.device)
    flat = x.dim() == 2
    args = (x if flat else _rows(x), weight, bias, *adapters, seed, float(scaling), threshold, backend)
    y = _call(DASH_LINEAR, args)
    y = y if flat else y.view(*x.shape[:-1], weight.shape[0])
    return y if whole is None else whole(y)


def low_rank_update(
    y: Tensor,  # (..., N)
    x: Tensor,  # (..., K)
    *,
    lora_a: Tensor,  # (r, K)
    lora_b: Tensor,  # (N, r)
    dash_u: Tensor | None = None,  # (N, s)
    dash_vt: Tensor | None = None,  # (s, K)
    dash_sigma: Tensor | None = None,  # (s,)
    scaling: float = 1.0,
    dropout_p: float = 0.0,
    training: bool = True,
    backend: str | None = None,
) -> Tensor:  # (..., N)
    """y plus the low-rank terms of `dash_linear`, for a base layer of any kind (quantised, sharded, another library's).

    Arguments and errors are those of `dash_linear`; y (..., N) is in the dtype of x and is not written to. Under autocast x
    takes the dtype of y, which the base layer chose: the result is what that layer alone would give, in dtype too.
    """
    if arguments.autocast_dtype(x) is not None and x.is_floating_point() and y.is_floating_point():
        x = x.to(y.dtype)
    shape = (y.shape[-1] if y.dim() else 0, x.shape[-1] if x.dim() else 0)
    adapters = (lora_a, lora_b, dash_u, dash_vt, dash_sigma)
    arguments.check_adapters(x, shape, *adapters)
    arguments.check_sum(y, x)
    threshold = _threshold(dropout_p, training)
    seed = whole = None
    if type(x) is not Tensor and sharded.is_distributed(x):
        tensors = dict(zip(_ARGUMENTS_OF_UPDATE, (y, x, *adapters), strict=True))
        (y, x, lora_a, lora_b, dash_u, dash_vt, dash_sigma), seed, whole = sharded.split(threshold, tensors)
        adapters = (lora_a, lora_b, dash_u, dash_vt, dash_sigma)
    if composite.is_wanted():
        composite.refuse(threshold, backend)
        out = composite.low_rank_update(y, x, *adapters, scaling)
        return out if whole is None else whole(out)
    if threshold and seed is None:
        seed = draw_seed(x.device)
    args = (_rows(y), _rows(x), *adapters, seed, float(scaling), threshold, backend)
    out = _call(LOW_RANK_UPDATE, args)
    out = out if y.dim() == 2 else out.view(y.shape)
    return out if whole is None else whole(out)


def _rows(t: Tensor) -> Tensor:
    """(..., K) as (M, K), K = 0 included."""
    return t if t.dim() == 2 else t.reshape(math.prod(t.shape[:-1]), t.shape[-1])


def _threshold(p: float, training: bool) -> int:
    """dropout_p in 16 bits, 0 where nothing is dropped. p is checked in any case."""
    threshold = dropout_threshold(p) if p else 0
    return threshold if training else 0


# What the arguments of an operator are where kernels may be called without the dispatcher.
_PLAIN = frozenset({Tensor, torch.nn.Parameter, torch.nn.parameter.Buffer, type(None), float, int, str})


def _call(operator: Operator, args: tuple) -> Tensor:
    """Whatever looks at operations (compile, export, tracing, dispatch modes, tensor subclasses) sees the operator; eager
    training takes the Function, everything else neither."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or torch._C._is_tracing():
        _refuse_mixed(operator, args)
        return operator.dispatched(args)
    if not _PLAIN.issuperset(map(type, args)):
        _refuse_mixed(operator, args)
        return _call_with_subclasses(operator.packet, args)
    if args[0].is_meta:
        return operator.packet(*args)[0]
    if torch.is_grad_enabled():
        for tensor in operator.differentiable_of(args):
            if tensor is not None and tensor.requires_grad:
                return operator.differentiated(args)
    return operator.run(*args)[0]


def _refuse_mixed(operator: Operator, args: tuple) -> None:
    """Raises ValueError for DTensors among the arguments: where x is one too, each process calls with its part of them."""
    sharded.refuse_mixed({name: args[place] for name, place in operator.tensors})


def _call_with_subclasses(op: torch._ops.OpOverloadPacket, args: tuple) -> Tensor:
    """By the dispatcher, where a subclass of Tensor says how it takes an operator, or that it does not."""
    try:
        return op(*args)[0]
    except (NotImplementedError, TypeError, RuntimeError) as error:
        names = (argument.name for argument in op.default._schema.arguments)
        wrappers = [
            f"{n} is a {type(t).__name__}" for n, t in zip(names, args, strict=True) if is_traceable_wrapper_subclass(t)
        ]
        if not wrappers:
            raise
        raise ValueError(
            f"{', '.join(wrappers)}, which does not take {op}; wanted plain tensors, or the output of the base layer for "
            f"low_rank_update ({error})"
        ) from error
