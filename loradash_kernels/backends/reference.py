"""The layer in plain PyTorch: the oracle of the tests and the backend of last resort.

Letters: M tokens, K in_features, N out_features, r LoRA rank, s directions, R = r + s. Sums are taken in float32 (float64
for float64 inputs), as in the compiled backends; the base product in the dtype of x, as `nn.functional.linear` does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..calls import accumulator
from ..random import dropout_mask, keep_scale


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


def forward(
    x: Tensor,  # (M, K)
    weight: Tensor | None,  # (N, K); None: the base product is in `base`
    bias: Tensor | None,  # (N,)
    lora_a: Tensor,
    lora_b: Tensor,
    dash_u: Tensor | None,
    dash_vt: Tensor | None,
    dash_sigma: Tensor | None,
    seed: Tensor | None,
    scaling: float,
    threshold: int,
    base: Tensor | None,  # (M, N)
    y: Tensor,  # (M, N), written
    p: Tensor,  # (M, R), written
) -> None:
    """y = x W^T + b (or base) + ((dropout(x) D^T) * c) Q^T and p = dropout(x) D^T."""
    dtype = accumulator(x.dtype)
    d, q, c = stacked(lora_a, lora_b, dash_u, dash_vt, dash_sigma, scaling, dtype)
    torch.mm(_dropped(x, seed, threshold, dtype), d.t(), out=p)
    if weight is not None:
        base = torch.nn.functional.linear(x, weight, bias)
    assert base is not None
    y.copy_(torch.addmm(base.to(dtype), p * c, q.t()))


def backward(
    dy: Tensor,  # (M, N)
    x: Tensor,
    weight: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    dash_u: Tensor | None,
    dash_vt: Tensor | None,
    dash_sigma: Tensor | None,
    p: Tensor,
    seed: Tensor | None,
    scaling: float,
    threshold: int,
    dx: Tensor | None,  # (M, K), written; None: not wanted
    da: Tensor | None,  # (r, K)
    db_lora: Tensor | None,  # (N, r)
    dsigma: Tensor | None,  # (s,)
    dbias: Tensor | None,  # (N,)
) -> None:
    """The gradients of `forward`, from dy and p (design: G = dy Q; dx = dy W + mask * (G * c) D / (1 - p); ...)."""
    dtype = accumulator(x.dtype)
    r = lora_a.shape[0]
    d, q, c = stacked(lora_a, lora_b, dash_u, dash_vt, dash_sigma, scaling, dtype)
    dy_wide = dy.to(dtype)
    g = dy_wide @ q
    if dx is not None:
        low = _dropped((g * c) @ d, seed, threshold, dtype)
        dx.copy_(low if weight is None else low + (dy @ weight).to(dtype))
    if da is not None:
        torch.mm(scaling * g[:, :r].t(), _dropped(x, seed, threshold, dtype), out=da)
    if db_lora is not None:
        torch.mm(dy_wide.t(), scaling * p[:, :r], out=db_lora)
    if dsigma is not None:
        dsigma.copy_((g[:, r:] * p[:, r:]).sum(0))
    if dbias is not None:
        dbias.copy_(dy_wide.sum(0))
