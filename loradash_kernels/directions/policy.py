"""Which routes to the singular triplets of a weight are tried, and in which order.

- tail: the small end of a graded spectrum by a randomized SVD of the inverse. On square layers of trained transformers
  (condition number above a thousand) the last n / 12 triplets, and no more than 64 of them, held the top 8 directions.
- gram: all triplets from the eigenvectors of the Gram matrix of the short side, in the precision that its condition
  number asks for. Exact on rectangular layers, whose spectrum is flat at the small end and where the tail misleads.
- svd: the library's, where neither will do; in float64 where float32 does not resolve the smallest σ.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

METHODS = ("auto", "exact", "randomized")

# The tail route takes the last n / 12 triplets, which hold the top 8 directions, within bounds that do not grow with n:
# 64 were enough up to n = 3072 (docs/prelaunch.md), and 128 are twice that.
TAIL_FRACTION = 12
MIN_TAIL, MAX_TAIL = 32, 128

# Three steps of subspace iteration find 99.5% of the top 8 directions. Below n = 1024 six are taken, which cost less there
# than sending a layer on to the next route.
TAIL_POWER_ITERS = 3
SMALL, SMALL_POWER_ITERS = 1024, 6


class Route(NamedTuple):
    """A way to singular triplets: "tail", "gram" or "svd"; its precision, W's own on the tail; and the tail's rank."""

    kind: str
    precision: torch.dtype | None = None
    rank: int = 0

    def __str__(self) -> str:
        """The route's name: "gram float32", or "tail"."""
        return self.kind if self.precision is None else f"{self.kind} {str(self.precision).removeprefix('torch.')}"


def routes_for(w: Tensor, method: str, rank: int | None = None) -> tuple[Route, ...]:
    """The routes for a batch w (..., N, K) on its device; all but the last are checked.

    rank: of the tail, instead of `tail_rank`.
    """
    n, k = w.shape[-2:]
    tail = Route("tail", rank=min(n, k, rank or tail_rank(min(n, k))))
    if method == "randomized":
        return (tail,)
    full = full_routes(n, k, w.dtype, method, has_fast_float64(w.device))
    return (tail, *full) if method == "auto" and n == k else full


def tail_rank(n: int) -> int:
    """How many of n triplets the tail route takes."""
    return min(n, max(MIN_TAIL, min(MAX_TAIL, n // TAIL_FRACTION)))


def tail_power_iters(n: int) -> int:
    """The steps of subspace iteration of the tail route on n triplets."""
    return TAIL_POWER_ITERS if n >= SMALL else SMALL_POWER_ITERS


def full_routes(n: int, k: int, dtype: torch.dtype, method: str, fast_float64: bool | None) -> tuple[Route, ...]:
    """The routes to all triplets of an N x K matrix in the order in which they are tried.

    fast_float64: has the GPU at least half of float32's rate in float64 (A100: yes, RTX 3090: 1/64)? None for a CPU.

    "exact" takes the one SVD of near-square matrices, which costs less than two Gram matrices of rising precision; but on
    a GPU of fast float64, where the SVD takes many times as long as eigenvectors, a Gram matrix in float64. A slow one is
    spared float64 but for the last resort.
    """
    near_square = method == "exact" and max(n, k) < 2 * min(n, k)
    low, high = Route("gram", torch.float32), Route("gram", torch.float64)
    svd, last = Route("svd", torch.float32), Route("svd", torch.float64)
    if dtype == torch.float64:
        return (last,) if near_square else (high, last)
    if near_square:
        return (high, last) if fast_float64 else (svd, last)
    # A float32 SVD resolves less than the Gram matrix in float64.
    return (low, svd, last) if fast_float64 is False else (low, high, last)


def has_fast_float64(device: torch.device) -> bool | None:
    """Data-centre GPUs have; others compute float64 at 1/32 or 1/64 of their float32 rate. None for all that is no such GPU."""
    if device.type != "cuda":
        return None
    if torch.version.hip:
        return "gfx9" in torch.cuda.get_device_properties(device).gcnArchName
    return torch.cuda.get_device_capability(device) in ((6, 0), (7, 0), (8, 0), (9, 0), (10, 0))
