"""The routes to singular triplets of frozen weights, and the checks of what they give.

- tail: the small end of a graded spectrum by a randomized SVD of the inverse. On square layers of trained transformers
  (condition number above a thousand) n / 12 triplets, and never more than 64, hold the top 8 directions.
- gram: all triplets from the eigenvectors of the Gram matrix of the short side, in the precision that its condition
  number asks for. Exact on rectangular layers, whose spectrum is flat at the small end and where the tail misleads.
- svd: the library's, where neither will do; in float64 where float32 does not resolve the smallest σ.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .linalg import Triplets, batched_randomized_svd, orthogonality_loss, select

TAIL_FRACTION = (
    12  # the tail route takes the last n / 12 triplets, within these bounds: the number that holds the top 8
)
MIN_TAIL, MAX_TAIL = 32, 128  # does not grow with n (docs/prelaunch.md), 64 were enough up to n = 3072
TAIL_POWER_ITERS = 3  # 3 steps of subspace iteration and 8 columns of oversampling: 99.5% of the top 8 directions;
SMALL, SMALL_POWER_ITERS = 1024, 6  # below, steps cost less than sending a layer to the full route
MIN_TAIL_CONDITION = 300.0  # below, the small end is too flat to be told apart by the tail route
MAX_RELATIVE_ERROR = 2e-4  # of the smallest σ² from a Gram matrix: eps · condition²
MAX_SVD_ERROR = 0.03  # of the smallest σ from an SVD: eps · condition
MAX_RESIDUAL_PER_GAP = 0.3  # of a chosen triplet; 0.03 at most where the tail route is right, above 5 where it is wrong
MAX_ORTHOGONALITY_LOSS = 1e-3  # largest element of |UᵀU - I| of chosen vectors; up to 4e-4 from a float32 Gram matrix
MAX_RESIDUAL = 1e-2  # of a triplet from a full spectrum, relative to its σ; about 1e-6 where it is this weight's (measured at condition 3)


def tail_rank(n: int) -> int:
    """How many of n triplets the tail route takes."""
    return min(n, max(MIN_TAIL, min(MAX_TAIL, n // TAIL_FRACTION)))


def tail_triplets(w: Tensor, rank: int | None, generator: torch.Generator | None) -> Triplets:
    n = min(w.shape[-2:])
    if generator is None:
        generator = torch.Generator(w.device).manual_seed(0)
    rank = min(n, rank or tail_rank(n))
    power_iters = TAIL_POWER_ITERS if n >= SMALL else SMALL_POWER_ITERS
    return batched_randomized_svd(w, rank, power_iters=power_iters, generator=generator)


def norm_estimate(w: Tensor, steps: int = 3) -> Tensor:
    """A lower estimate of the largest singular value, good to tens of percent: power iteration from the column sums."""
    v = w.sum(-2)[..., None] + torch.finfo(w.dtype).tiny
    for _ in range(steps):
        v = w.mT @ (w @ (v / torch.linalg.vector_norm(v, dim=-2, keepdim=True).clamp_min(torch.finfo(w.dtype).tiny)))
    return torch.linalg.vector_norm(v, dim=(-2, -1)).sqrt()


def is_graded(norms: Tensor, tail: Triplets) -> Tensor:
    """(L,) bool: is the condition number large enough for the tail to be told apart?"""
    return norms >= MIN_TAIL_CONDITION * tail.sigma[..., -1]


def residuals(w: Tensor, u: Tensor, vt: Tensor, sigma: Tensor) -> Tensor:
    """The larger of ‖W v_i - σ_i u_i‖ and ‖Wᵀ u_i - σ_i v_i‖ (..., s)."""
    left = torch.linalg.vector_norm(w @ vt.mT - u * sigma[..., None, :], dim=-2)
    right = torch.linalg.vector_norm(w.mT @ u - vt.mT * sigma[..., None, :], dim=-2)
    return torch.maximum(left, right)


def are_orthonormal(u: Tensor, vt: Tensor) -> Tensor:
    """(L,) bool: are the columns of u (L, N, s) and the rows of vt (L, s, K) orthonormal?

    Residuals do not tell: those of a vanishing σ allow any vector, the zero vector too.
    """
    loss = torch.maximum(orthogonality_loss(u.mT @ u), orthogonality_loss(vt @ vt.mT))
    return loss <= MAX_ORTHOGONALITY_LOSS


def are_resolved(
    w: Tensor,
    norms: Tensor,  # (L,) of W, estimated
    sigma: Tensor,
    u: Tensor,
    vt: Tensor,
    chosen_sigma: Tensor,
    rate: Tensor,
    index: Tensor,
) -> list[bool]:
    """For each matrix: are the chosen vectors orthonormal and their residuals small against the gaps to their neighbours?

    A residual larger than the gap means a mixture of neighbours. Singular values that are equal up to rounding have no
    directions of their own, so rounding is allowed for.
    """
    spacing = (sigma[..., :-1] - sigma[..., 1:]).abs()
    edge = torch.full_like(sigma[..., :1], torch.inf)
    gaps = torch.minimum(torch.cat((edge, spacing), -1), torch.cat((spacing, edge), -1))
    local = index - (min(w.shape[-2:]) - sigma.shape[-1])
    allowed = torch.maximum(MAX_RESIDUAL_PER_GAP * gaps.gather(-1, local), rounding(w, norms)[..., None])
    good = (residuals(w, u, vt, chosen_sigma) <= allowed).all(-1)
    return (good & are_orthonormal(u, vt)).tolist()


def are_triplets(w: Tensor, largest: Tensor, u: Tensor, vt: Tensor, sigma: Tensor) -> list[bool]:
    """For each matrix: are these singular triplets of it, orthonormal, taken from all? largest (L,): its largest σ."""
    allowed = torch.maximum(MAX_RESIDUAL * sigma, rounding(w, largest)[..., None])  # a σ of 0 has no other mark
    good = (residuals(w, u, vt, sigma) <= allowed).all(-1)
    return (good & are_orthonormal(u, vt)).tolist()


def rounding(w: Tensor, norms: Tensor) -> Tensor:
    """The residual (L,) that rounding alone may leave of a triplet; norms (L,) of W."""
    return 8 * torch.finfo(w.dtype).eps * max(w.shape[-2:]) ** 0.5 * norms


# --- all triplets ----------------------------------------------------------------------------------------------------


class Half:
    """All singular values, and the vectors of the short side only: those of the long side are W's products with them.

    In the precision of the route: float32 products with W would leave errors of eps · condition number.
    """

    def __init__(self, w: Tensor, basis: Tensor, sigma: Tensor, left: bool) -> None:
        self.w, self.basis, self.sigma, self.left = w, basis, sigma, left  # basis (L, n, n), columns

    def take(self, which: Sequence[int]) -> Half:
        return Half(select(self.w, which), select(self.basis, which), select(self.sigma, which), self.left)

    def other(self, columns: Tensor, sigma: Tensor) -> Tensor:
        """Vectors of the long side, as columns, for some columns of the basis; zero where σ is."""
        product = (self.w.mT if self.left else self.w) @ columns
        return product / sigma.clamp_min(torch.finfo(sigma.dtype).tiny)[..., None, :]

    def full(self) -> Triplets:
        other = self.other(self.basis, self.sigma)
        return Triplets(self.basis, self.sigma, other.mT) if self.left else Triplets(other, self.sigma, self.basis.mT)


def gram_half(w: Tensor, precision: torch.dtype) -> Half:
    """2 N K n FLOPs for the Gram matrix of the short side n, about 9 n³ for its eigenvectors."""
    left = w.shape[-2] <= w.shape[-1]
    wide = w.to(precision)
    squares, basis = torch.linalg.eigh(_lower_gram(wide if left else wide.mT))
    sigma = squares.flip(-1).clamp_min(0).sqrt()
    return Half(wide, basis.flip(-1), sigma, left)


def _lower_gram(x: Tensor, parts: int = 4) -> Tensor:
    """The lower triangle of x xᵀ (L, n, n), which is all that eigh reads, in blocks of rows: 5/8 of the FLOPs."""
    n = x.shape[-2]
    gram = x.new_zeros(*x.shape[:-1], n)
    edges = [n * i // parts for i in range(parts + 1)]
    for first, last in itertools.pairwise(edges):
        gram[..., first:last, :last] = x[..., first:last, :] @ x[..., :last, :].mT
    return gram


class Route(NamedTuple):
    """A way to all triplets: "gram" (eigenvectors of the short side's Gram matrix) or "svd", and the precision of it."""

    kind: str
    precision: torch.dtype

    def __str__(self) -> str:
        return f"{self.kind} {str(self.precision).removeprefix('torch.')}"  # "gram float32"


def full_routes(n: int, k: int, dtype: torch.dtype, method: str, fast_float64: bool | None) -> tuple[Route, ...]:
    """The routes to all triplets of an N x K matrix in the order in which they are tried; each is checked but the last.

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


def routes_of(w: Tensor, method: str) -> tuple[Route, ...]:
    """`full_routes` of a batch, on its device."""
    fast = None if w.device.type == "cpu" else has_fast_float64(w.device)
    return full_routes(w.shape[-2], w.shape[-1], w.dtype, method, fast)


def has_fast_float64(device: torch.device) -> bool:
    """Data-centre cards have; others compute float64 at 1/32 or 1/64 of their float32 rate."""
    if torch.version.hip:
        return "gfx9" in torch.cuda.get_device_properties(device).gcnArchName
    return torch.cuda.get_device_capability(device) in ((6, 0), (7, 0), (8, 0), (9, 0), (10, 0))


def follow(route: Route, w: Tensor) -> tuple[Triplets | Half, list[bool]]:
    """All triplets of a batch by one route, in its precision, and for each matrix whether its spectrum allows the route."""
    if route.kind == "gram":
        half = gram_half(w, route.precision)
        return half, is_accurate(half.sigma, route.precision)
    full = Triplets(*torch.linalg.svd(w.to(route.precision), full_matrices=False))
    resolved = torch.finfo(route.precision).eps * full.sigma[..., 0] <= MAX_SVD_ERROR * full.sigma[..., -1]
    return full, [True] * w.shape[0] if route.precision == torch.float64 else resolved.tolist()


def is_accurate(sigma: Tensor, precision: torch.dtype) -> list[bool]:
    """For each matrix: is the smallest σ² of its Gram matrix above the rounding error of the largest, and above zero?

    W's products with the basis are the other side's vectors times σ: where σ is zero, they are nothing.
    """
    squares = sigma.double().square()
    accurate = torch.finfo(precision).eps * squares[..., 0] <= MAX_RELATIVE_ERROR * squares[..., -1]
    return (accurate & (squares[..., -1] > 0)).tolist()
