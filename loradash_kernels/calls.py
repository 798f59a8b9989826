"""What a backend is asked to do: one pass of one layer, with the memory of its results.

The fields are those of the compiled operators (`loradash_cpu::forward`, `loradash_cuda::forward`, ...) in their order: a
backend in Python reads `call.lora_a`, a compiled operator takes `*call` (those for CUDA the name of a tile besides). Letters: M tokens, K in_features, N out_features,
r LoRA rank, s directions, R = r + s.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

Pass = Literal["forward", "backward"]


class ForwardCall(NamedTuple):
    """y = x Wᵀ + b (or base) + ((x̃ Dᵀ) ⊙ c) Qᵀ and P = x̃ Dᵀ, with x̃ = dropout(x)."""

    x: Tensor  # (M, K)
    weight: Tensor | None  # (N, K); None: the base product is in `base`
    bias: Tensor | None  # (N,)
    lora_a: Tensor  # (r, K)
    lora_b: Tensor  # (N, r)
    dash_u: Tensor | None  # (N, s)
    dash_vt: Tensor | None  # (s, K)
    dash_sigma: Tensor | None  # (s,)
    seed: Tensor | None  # (2,) int64, (4,) of a window; None or threshold 0: nothing is dropped
    scaling: float
    threshold: int  # 16 bits of dropout_p
    base: Tensor | None  # (M, N)
    y: Tensor  # (M, N), written
    p: Tensor  # (M, R), written, in the accumulator's dtype

    @property
    def pass_(self) -> Pass:
        return "forward"


class BackwardCall(NamedTuple):
    """The gradients of a forward call; None in place of those that are not wanted."""

    dy: Tensor  # (M, N)
    x: Tensor  # (M, K)
    weight: Tensor | None  # (N, K); None: dx is that of the low-rank terms alone
    lora_a: Tensor  # (r, K)
    lora_b: Tensor  # (N, r)
    dash_u: Tensor | None  # (N, s)
    dash_vt: Tensor | None  # (s, K)
    dash_sigma: Tensor | None  # (s,)
    p: Tensor  # (M, R), which forward wrote
    seed: Tensor | None  # that of forward
    scaling: float
    threshold: int
    dx: Tensor | None  # (M, K), written, in the dtype of x; the other gradients in the accumulator's
    da: Tensor | None  # (r, K), written
    db_lora: Tensor | None  # (N, r), written
    dsigma: Tensor | None  # (s,), written
    dbias: Tensor | None  # (N,), written

    @property
    def pass_(self) -> Pass:
        return "backward"


class GroupForwardCall(NamedTuple):
    """Forward calls of several members that read the same x under one mask: their fields in lists, and one P.

    A member without a bias has one of shape (0,), one without directions has s = 0.
    """

    x: Tensor  # (M, K)
    weight: list[Tensor]  # (N, K) each
    bias: list[Tensor]  # (N,) or (0,)
    lora_a: list[Tensor]  # (r, K)
    lora_b: list[Tensor]  # (N, r)
    dash_u: list[Tensor]  # (N, s)
    dash_vt: list[Tensor]  # (s, K)
    dash_sigma: list[Tensor]  # (s,)
    seed: Tensor | None
    scaling: list[float]
    threshold: int
    y: list[Tensor]  # (M, N) each, written
    p: Tensor  # (M, R), written; R sums the members' widths, their columns lie side by side

    @property
    def pass_(self) -> Pass:
        return "forward"

    def member(self, i: int, p: Tensor) -> ForwardCall:
        """The call of one member alone, with a P (M, R) of its own."""
        return ForwardCall(
            self.x,
            self.weight[i],
            self.bias[i] if self.bias[i].numel() else None,
            *directed(self, i),
            self.seed,
            self.scaling[i],
            self.threshold,
            None,
            self.y[i],
            p,
        )


class GroupBackwardCall(NamedTuple):
    """The gradients of a group's forward call; None in place of those that are not wanted."""

    dy: list[Tensor]  # (M, N) each
    x: Tensor  # (M, K)
    weight: list[Tensor]
    lora_a: list[Tensor]
    lora_b: list[Tensor]
    dash_u: list[Tensor]
    dash_vt: list[Tensor]
    dash_sigma: list[Tensor]
    p: Tensor  # (M, R), which forward wrote
    seed: Tensor | None
    scaling: list[float]
    threshold: int
    dx: Tensor | None  # (M, K), written: the sum over the members
    da: list[Tensor | None]
    db_lora: list[Tensor | None]
    dsigma: list[Tensor | None]
    dbias: list[Tensor | None]

    @property
    def pass_(self) -> Pass:
        return "backward"

    def member(self, i: int, p: Tensor, dx: Tensor | None) -> BackwardCall:
        """The call of one member alone, with its columns of P and a dx of its own."""
        return BackwardCall(
            self.dy[i],
            self.x,
            self.weight[i],
            *directed(self, i),
            p,
            self.seed,
            self.scaling[i],
            self.threshold,
            dx,
            self.da[i],
            self.db_lora[i],
            self.dsigma[i],
            self.dbias[i],
        )


GroupCall = GroupForwardCall | GroupBackwardCall


def directed(call: GroupCall, i: int) -> Adapters:
    """lora_a, lora_b, dash_u, dash_vt, dash_sigma of a member, the last three None where it has no directions."""
    a, b, u, vt, sigma = call.lora_a[i], call.lora_b[i], call.dash_u[i], call.dash_vt[i], call.dash_sigma[i]
    return (a, b, u, vt, sigma) if sigma.numel() else (a, b, None, None, None)


def widths(call: GroupCall) -> list[int]:
    """R = r + s of every member: how many columns of P are its own."""
    return [a.shape[0] + sigma.shape[0] for a, sigma in zip(call.lora_a, call.dash_sigma, strict=True)]


Call = ForwardCall | BackwardCall
Adapters = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]


def adapters(call: Call) -> Adapters:
    """lora_a, lora_b, dash_u, dash_vt, dash_sigma."""
    return call.lora_a, call.lora_b, call.dash_u, call.dash_vt, call.dash_sigma


KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""The dtypes of x that kernels are there for; plain PyTorch serves the others."""


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums, of P and of gradients before they are rounded: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
