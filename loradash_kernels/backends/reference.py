"""The layer in plain PyTorch: the oracle of the tests and the backend of last resort.

Letters: M tokens, K in_features, N out_features, r LoRA rank, s directions, R = r + s. Sums are taken in float32 (float64
for float64 inputs), as in the compiled backends; the base product in the dtype of x, as `nn.functional.linear` does.
Autocast, which has cast what it may before a backend is chosen, casts no operand of these products. On a GPU the same
layer is computed by `products`, from float64 on by these formulas.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..calls import (
    BackwardCall,
    Call,
    ForwardCall,
    GroupBackwardCall,
    GroupCall,
    GroupForwardCall,
    accumulator,
    adapters,
    directed,
    widths,
)
from ..random import dropout_mask, keep_scale
from . import products

name = "reference"


def missing() -> str | None:
    """None: plain PyTorch is always there."""
    return None


def refuses(x: Tensor, width: int = 0) -> str | None:
    """None: plain PyTorch takes whatever the operator takes."""
    return None


def stacked(
    lora_a: Tensor,  # (r, K)
    lora_b: Tensor,  # (N, r)
    dash_u: Tensor | None,  # (N, s)
    dash_vt: Tensor | None,  # (s, K)
    dash_sigma: Tensor | None,  # (s,)
    scaling: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """D = [A; Vt] (R, K), Q = [B | U] (N, R) and c = [scaling; sigma] (R,), in `dtype`."""
    d, q = lora_a.to(dtype), lora_b.to(dtype)
    c = lora_a.new_full((lora_a.shape[0],), scaling, dtype=dtype)
    if dash_u is None or dash_vt is None or dash_sigma is None:
        return d, q, c
    return torch.cat((d, dash_vt.to(dtype))), torch.cat((q, dash_u.to(dtype)), 1), torch.cat((c, dash_sigma.to(dtype)))


def _dropped(x: Tensor, seed: Tensor | None, threshold: int, dtype: torch.dtype) -> Tensor:
    x = x.to(dtype)
    if seed is None or threshold == 0:
        return x
    return x * dropout_mask(seed, threshold, *x.shape) * keep_scale(threshold)


def forward(call: ForwardCall) -> None:
    """y = x W^T + b (or base) + ((dropout(x) D^T) * c) Q^T and p = dropout(x) D^T."""
    with torch._C._DisableAutocast():
        (products.forward if _on_gpu(call) else _forward)(call)


def backward(call: BackwardCall) -> None:
    """The gradients of `forward`, from dy and p (design: G = dy Q; dx = dy W + mask * (G * c) D / (1 - p); ...)."""
    with torch._C._DisableAutocast():
        (products.backward if _on_gpu(call) else _backward)(call)


def group_forward(call: GroupForwardCall) -> None:
    """`forward` of every member, with one dropped x and one product with all their D."""
    with torch._C._DisableAutocast():
        (products.group_forward if _on_gpu(call) else _group_forward)(call)


def group_backward(call: GroupBackwardCall) -> None:
    """`backward` of every member, dx summed."""
    with torch._C._DisableAutocast():
        (products.group_backward if _on_gpu(call) else _group_backward)(call)


def _on_gpu(call: Call | GroupCall) -> bool:
    return call.x.is_cuda and call.x.dtype != torch.float64


def _forward(call: ForwardCall) -> None:
    dtype = accumulator(call.x.dtype)
    d, q, c = stacked(*adapters(call), call.scaling, dtype)
    torch.mm(_dropped(call.x, call.seed, call.threshold, dtype), d.t(), out=call.p)
    base = call.base if call.weight is None else torch.nn.functional.linear(call.x, call.weight, call.bias)
    assert base is not None
    call.y.copy_(torch.addmm(base.to(dtype), call.p * c, q.t()))


def _backward(call: BackwardCall) -> None:
    dtype, r = accumulator(call.x.dtype), call.lora_a.shape[0]
    d, q, c = stacked(*adapters(call), call.scaling, dtype)
    dy = call.dy.to(dtype)
    g = dy @ q
    if call.dx is not None:
        low = _dropped((g * c) @ d, call.seed, call.threshold, dtype)
        call.dx.copy_(low if call.weight is None else low + (call.dy @ call.weight).to(dtype))
    if call.da is not None:
        torch.mm(call.scaling * g[:, :r].t(), _dropped(call.x, call.seed, call.threshold, dtype), out=call.da)
    if call.db_lora is not None:
        torch.mm(dy.t(), call.scaling * call.p[:, :r], out=call.db_lora)
    if call.dsigma is not None:
        call.dsigma.copy_((g[:, r:] * call.p[:, r:]).sum(0))
    if call.dbias is not None:
        call.dbias.copy_(dy.sum(0))


def _group_forward(call: GroupForwardCall) -> None:
    dtype = accumulator(call.x.dtype)
    stacks = [stacked(*directed(call, i), call.scaling[i], dtype) for i in range(len(call.y))]
    dropped = _dropped(call.x, call.seed, call.threshold, dtype)
    torch.mm(dropped, torch.cat([d for d, _, _ in stacks]).t(), out=call.p)
    for y, p, weight, bias, (_, q, c) in zip(
        call.y, call.p.split(widths(call), 1), call.weight, call.bias, stacks, strict=True
    ):
        base = torch.nn.functional.linear(call.x, weight, bias if bias.numel() else None)
        y.copy_(torch.addmm(base.to(dtype), p * c, q.t()))


def _group_backward(call: GroupBackwardCall) -> None:
    dtype, parts = accumulator(call.x.dtype), call.p.split(widths(call), 1)
    dx = None if call.dx is None else call.x.new_zeros(call.x.shape, dtype=dtype)
    for i, p in enumerate(parts):
        part = None if dx is None else torch.empty_like(call.x)
        _backward(call.member(i, p, part))
        if dx is not None and part is not None:
            dx += part
    if call.dx is not None and dx is not None:
        call.dx.copy_(dx)
