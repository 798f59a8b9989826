"""The public functions: check the arguments, flatten x to (M, K), call the operator."""

from __future__ import annotations

import torch
from torch import Tensor

from . import ops
from .autograd import DashLinearFunction, LowRankUpdateFunction
from .config import draw_seed, dropout_threshold

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


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
        backend: a name of `available_backends()`; None takes the first that can run (`explain_backend` tells which).

    Under autocast x, weight and bias are cast to its dtype, as `nn.functional.linear` does.

    Raises:
        ValueError: a shape, dtype or device that does not fit, named; a weight that requires grad.
        RuntimeError: a requested backend that cannot run; differentiating the gradients again.
    """
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    _check(x, weight.shape, lora_a, lora_b, dash_u, dash_vt, dash_sigma)
    if weight.requires_grad:
        raise ValueError(
            "weight requires grad; the base weight of a LoRA-Dash layer is frozen: weight.requires_grad_(False)"
        )
    if weight.dtype != x.dtype:
        raise ValueError(f"weight is {weight.dtype}, x is {x.dtype}; they must be of one dtype")
    _check_device(x, weight=weight, bias=bias)
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != x.dtype):
        raise ValueError(
            f"bias has shape {tuple(bias.shape)} and dtype {bias.dtype}; wanted ({weight.shape[0]},) and {x.dtype}"
        )
    threshold, seed = _dropout(x, dropout_p, training)
    flat = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    args = (flat, weight, bias, lora_a, lora_b, dash_u, dash_vt, dash_sigma, seed, float(scaling), threshold, backend)
    leaves = (x, lora_a, lora_b, dash_sigma, bias)
    y = _call(torch.ops.loradash.dash_linear, DashLinearFunction, ops.dash_linear, args, leaves)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], weight.shape[0])


def _check_device(x: Tensor, **others: Tensor | None) -> None:
    for name, t in others.items():
        if t is not None and t.device != x.device:
            raise ValueError(f"{name} is on {t.device}, x is on {x.device}; they must be on one device")


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

    Arguments and errors are those of `dash_linear`; y (..., N) is in the dtype of x and is not written to.
    """
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    if y.dtype != x.dtype:
        raise ValueError(f"y is {y.dtype}, x is {x.dtype}; they must be of one dtype")
    _check_device(x, y=y)
    _check(
        x, (y.shape[-1] if y.dim() else 0, x.shape[-1] if x.dim() else 0), lora_a, lora_b, dash_u, dash_vt, dash_sigma
    )
    if y.shape[:-1] != x.shape[:-1]:
        raise ValueError(
            f"y has shape {tuple(y.shape)}, x {tuple(x.shape)}; they must agree but for the last dimension"
        )
    threshold, seed = _dropout(x, dropout_p, training)
    flat_x, flat_y = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
    args = (flat_y, flat_x, lora_a, lora_b, dash_u, dash_vt, dash_sigma, seed, float(scaling), threshold, backend)
    leaves = (x, y, lora_a, lora_b, dash_sigma)
    return _call(torch.ops.loradash.low_rank_update, LowRankUpdateFunction, ops.low_rank_update, args, leaves).view(
        y.shape
    )


def _call(op: object, function: object, plain: object, args: tuple, leaves: tuple[Tensor | None, ...]) -> Tensor:
    """Compiled graphs and tensor subclasses see the operator, eager training the Function, the rest neither.

    leaves: the arguments that a gradient may be wanted for, x first.
    """
    x = leaves[0]
    if torch.compiler.is_compiling() or not (type(x) is Tensor or type(x) is torch.nn.Parameter):
        return op(*args)[0]  # type: ignore[operator]
    if torch.is_grad_enabled():
        for leaf in leaves:
            if leaf is not None and leaf.requires_grad:
                return function.apply(*args)[0]  # type: ignore[attr-defined]
    return plain(*args)[0]  # type: ignore[operator]


def _dropout(x: Tensor, p: float, training: bool) -> tuple[int, Tensor | None]:
    """The 16-bit threshold, and the seed where anything may be dropped."""
    threshold = dropout_threshold(p) if p else 0
    if threshold == 0 or not training:
        return 0, None
    return threshold, draw_seed(x.device)


def _check(
    x: Tensor,
    weight_shape: torch.Size | tuple[int, int],
    lora_a: Tensor,
    lora_b: Tensor,
    dash_u: Tensor | None,
    dash_vt: Tensor | None,
    dash_sigma: Tensor | None,
) -> None:
    if x.dim() == 0 or x.dtype not in _FLOATS:
        raise ValueError(f"x has shape {tuple(x.shape)} and dtype {x.dtype}; wanted (..., K) of a floating dtype")
    if len(weight_shape) != 2 or weight_shape[1] != x.shape[-1]:
        raise ValueError(f"weight has shape {tuple(weight_shape)}; wanted (N, {x.shape[-1]}) for x {tuple(x.shape)}")
    n, k = weight_shape
    device = x.device
    if lora_a.dim() != 2 or lora_a.shape[1] != k:
        raise ValueError(f"lora_a has shape {tuple(lora_a.shape)}; wanted (r, {k})")
    if lora_b.shape != (n, lora_a.shape[0]):
        raise ValueError(f"lora_b has shape {tuple(lora_b.shape)}; wanted ({n}, {lora_a.shape[0]})")
    adapters = [("lora_a", lora_a), ("lora_b", lora_b)]
    if dash_u is not None and dash_vt is not None and dash_sigma is not None:
        s = dash_sigma.numel()
        if dash_u.shape != (n, s) or dash_vt.shape != (s, k) or dash_sigma.dim() != 1:
            shapes = tuple(dash_u.shape), tuple(dash_vt.shape), tuple(dash_sigma.shape)
            raise ValueError(
                f"dash_u, dash_vt and dash_sigma have shapes {shapes}; wanted ({n}, s), (s, {k}) and (s,) of one s"
            )
        adapters += [("dash_u", dash_u), ("dash_vt", dash_vt), ("dash_sigma", dash_sigma)]
    elif dash_u is not None or dash_vt is not None or dash_sigma is not None:
        raise ValueError("dash_u, dash_vt and dash_sigma go together: pass all three or none")
    for name, tensor in adapters:
        if tensor.device != device or not tensor.dtype.is_floating_point:
            raise ValueError(f"{name} is {tensor.dtype} on {tensor.device}; wanted a floating dtype on {device}")
