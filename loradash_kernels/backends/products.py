"""The layer as products of the vendor's library, with dropout in one kernel: plain PyTorch where a GPU has no kernels of ours.

Letters and formulas as in `reference`. Operands of 16 bits stay so, sums and P are float32; adapters are rounded to the
dtype of x, as tensor cores take them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..calls import BackwardCall, Call, ForwardCall, GroupBackwardCall, GroupForwardCall, adapters, widths
from ..random import keep_scale
from .fused_dropout import dropped

# PyTorch 2.8 and newer sum 16-bit products into float32 results.
_WIDE_RESULTS = "dtype_out" in torch.ops.aten.mm.overloads() and not torch.version.hip


def forward(call: ForwardCall) -> None:
    """y and P of a call, whose x is of 16 or 32 bits."""
    d, q, c = _factors(call)
    if call.weight is not None:
        _linear(call.x, call.weight, call.bias, call.y)
    else:
        assert call.base is not None
        call.y.copy_(call.base)
    if c is None:
        return
    _wide_product(dropped(call.x, call.seed, call.threshold), d.t(), call.p)
    keep = _keep_scale(call)
    if keep != 1.0:
        call.p.mul_(keep)
    call.y.addmm_((call.p * c).to(call.x.dtype), q.t())


def backward(call: BackwardCall) -> None:
    """The gradients that are wanted."""
    (d, q, c), dtype, r = _factors(call), call.x.dtype, call.lora_a.shape[0]
    g = t = None
    if c is not None and any(grad is not None for grad in (call.dx, call.da, call.dsigma)):
        g = call.p.new_empty(call.p.shape)
        _wide_product(call.dy, q, g)
        t = g * c
    if call.dx is not None:
        low = None if t is None else dropped(_scaled(t, _keep_scale(call)).to(dtype) @ d, call.seed, call.threshold)
        _sum_dx(call, low, call.dx)
    if call.da is not None and t is not None:
        _wide_product(t[:, :r].to(dtype).t(), dropped(call.x, call.seed, call.threshold), call.da)
        if _keep_scale(call) != 1.0:
            call.da.mul_(_keep_scale(call))
    if call.db_lora is not None:
        _wide_product(call.dy.t(), (call.p[:, :r] * call.scaling).to(dtype), call.db_lora)
    if call.dsigma is not None and g is not None:
        torch.sum(g[:, r:] * call.p[:, r:], 0, out=call.dsigma)
    if call.dbias is not None:
        torch.sum(call.dy, 0, dtype=call.dbias.dtype, out=call.dbias)


def group_forward(call: GroupForwardCall) -> None:
    """Every y, and P of all members: x is dropped once, and multiplied once with all their D."""
    parts = call.p.split(widths(call), 1)
    members = [call.member(i, p) for i, p in enumerate(parts)]
    factors = [_factors(member) for member in members]
    if call.p.shape[1]:
        stack = torch.cat([d for d, _, _ in factors])
        _wide_product(dropped(call.x, call.seed, call.threshold), stack.t(), call.p)
        keep = _keep_scale(members[0])
        if keep != 1.0:
            call.p.mul_(keep)
    for member, (_, q, c) in zip(members, factors, strict=True):
        assert member.weight is not None
        _linear(call.x, member.weight, member.bias, member.y)
        if c is not None:
            member.y.addmm_((member.p * c).to(call.x.dtype), q.t())


def group_backward(call: GroupBackwardCall) -> None:
    """The gradients that are wanted: the masked low-rank terms of dx are one product, all dA another."""
    members = [call.member(i, p, None) for i, p in enumerate(call.p.split(widths(call), 1))]
    factors, dtype = [_factors(member) for member in members], call.x.dtype
    g = call.p.new_empty(call.p.shape)
    for member, part, (_, q, c) in zip(members, g.split(widths(call), 1), factors, strict=True):
        if c is not None:
            part.copy_(_widened(member.dy, q, member.p.dtype))
        backward(member._replace(da=None, dsigma=None))
        if member.dsigma is not None:
            r = member.lora_a.shape[0]
            torch.sum(part[:, r:] * member.p[:, r:], 0, out=member.dsigma)
    if call.dx is not None:
        c = torch.cat([call.p.new_empty(0) if c is None else c for _, _, c in factors])
        stack, keep = torch.cat([d for d, _, _ in factors]), _keep_scale(members[0])
        torch.mm(_scaled(g * c, keep).to(dtype), stack, out=call.dx)
        call.dx.copy_(dropped(call.dx, call.seed, call.threshold))
        for dy, weight in zip(call.dy, call.weight, strict=True):
            call.dx.addmm_(dy, weight)
    wanted = [
        (da, part[:, : a.shape[0]] * scaling)
        for da, part, a, scaling in zip(call.da, g.split(widths(call), 1), call.lora_a, call.scaling, strict=True)
        if da is not None
    ]
    if wanted:
        kept = dropped(call.x, call.seed, call.threshold)
        product = _widened(torch.cat([t for _, t in wanted], 1).to(dtype).t(), kept, call.p.dtype)
        found = _scaled(product, _keep_scale(members[0])).split([t.shape[1] for _, t in wanted])
        for (da, _), rows in zip(wanted, found, strict=True):
            da.copy_(rows)


def _widened(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    out = a.new_empty(a.shape[0], b.shape[1], dtype=dtype)
    _wide_product(a, b, out)
    return out


def _sum_dx(call: BackwardCall, low: Tensor | None, dx: Tensor) -> None:
    """dx = dy W + low, of what there is."""
    if call.weight is None:
        dx.zero_() if low is None else dx.copy_(low)
    elif low is None:
        torch.mm(call.dy, call.weight, out=dx)
    else:
        torch.addmm(low, call.dy, call.weight, out=dx)


def _factors(call: Call) -> tuple[Tensor, Tensor, Tensor | None]:
    """D (R, K) and Q (N, R) in the dtype of x, c (R,) in float32; without ranks c is None."""
    lora_a, lora_b, dash_u, dash_vt, dash_sigma = adapters(call)
    dtype = call.x.dtype
    d, q = lora_a.to(dtype), lora_b.to(dtype)
    width = call.p.shape[1]
    if width == 0:
        return d, q, None
    c = call.p.new_full((width,), call.scaling)
    if dash_u is not None and dash_vt is not None and dash_sigma is not None:
        d, q = torch.cat((d, dash_vt.to(dtype))), torch.cat((q, dash_u.to(dtype)), 1)
        c.narrow(0, lora_a.shape[0], dash_sigma.shape[0]).copy_(dash_sigma)
    return d, q, c


def _keep_scale(call: Call) -> float:
    return 1.0 if call.seed is None else keep_scale(call.threshold)


def _scaled(t: Tensor, scale: float) -> Tensor:
    return t if scale == 1.0 else t * scale


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    if bias is None:
        torch.mm(x, weight.t(), out=out)
    else:
        torch.addmm(bias, x, weight.t(), out=out)


def _wide_product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a b, summed and kept in the dtype of out, which is that of a and b or float32."""
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    elif a.is_cuda and _WIDE_RESULTS:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:
        torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)
