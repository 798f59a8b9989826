"""The layer in plain PyTorch: the oracle of the tests and the backend of last resort.

Letters: M tokens, K in_features, N out_features, r LoRA rank, s directions, R = r + s. Sums are taken in float32 (float64
for float64 inputs), as in the compiled backends; the base product in the dtype of x, as `nn.functional.linear` does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .config import accumulator, keep_scale

_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_WORD = 0xFFFFFFFF


def _product(constant: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of constant * word; int64 tensors hold 32-bit words, so the factors are split in half."""
    low = constant * (word & 0xFFFF)
    high = constant * (word >> 16)
    total = (high & 0xFFFF_FFFF_FFFF) + (low >> 16)
    return (total >> 16) & _WORD, ((total & 0xFFFF) << 16) | (low & 0xFFFF)


def philox_words(
    seed: Tensor,  # (2,) int64: key, then counter offset
    m: Tensor,  # broadcastable int64
    block: Tensor,  # broadcastable int64, k // 8
) -> list[Tensor]:
    """The four 32-bit words of Philox4x32-10 (Salmon et al., SC 2011), counter (block, m, offset), as int64."""
    key0, key1 = seed[0] & _WORD, (seed[0] >> 32) & _WORD
    shape = torch.broadcast_shapes(m.shape, block.shape)
    c = [block.expand(shape), m.expand(shape), (seed[1] & _WORD).expand(shape), ((seed[1] >> 32) & _WORD).expand(shape)]
    for _ in range(10):
        high0, low0 = _product(_M0, c[0])
        high1, low1 = _product(_M1, c[2])
        c = [high1 ^ c[1] ^ key0, low1, high0 ^ c[3] ^ key1, low0]
        key0, key1 = (key0 + _W0) & _WORD, (key1 + _W1) & _WORD
    return c


def dropout_mask(seed: Tensor, threshold: int, m: int, k: int) -> Tensor:
    """Keep mask (m, k), bool: the bits every backend draws for this seed (2,) int64 and 16-bit threshold."""
    if threshold == 0:
        return torch.ones(m, k, dtype=torch.bool, device=seed.device)
    rows = torch.arange(m, device=seed.device)[:, None]
    blocks = torch.arange((k + 7) // 8, device=seed.device)[None, :]
    words = torch.stack(philox_words(seed, rows, blocks), dim=-1)  # (m, blocks, 4)
    halves = torch.stack((words & 0xFFFF, words >> 16), dim=-1)  # (m, blocks, 4, 2)
    return (halves.flatten(1)[:, :k] >= threshold).contiguous()


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
