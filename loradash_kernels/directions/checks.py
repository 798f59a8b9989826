"""Checks of decompositions, and of the triplets that were chosen from them."""

from __future__ import annotations

import torch
from torch import Tensor

from .linalg import orthogonality_loss
from .policy import Route

# Below this condition number the small end is too flat to be told apart by the tail route.
MIN_TAIL_CONDITION = 300.0
# The relative error that is allowed to the smallest σ² from a Gram matrix, which is eps · condition².
MAX_RELATIVE_ERROR = 2e-4
# The relative error that is allowed to the smallest σ from an SVD, which is eps · condition.
MAX_SVD_ERROR = 0.03
# The residual that is allowed to a triplet of the tail, over the gap to the nearest σ: it is 0.03 at most where the tail
# route is right, and above 5 where it is wrong.
MAX_RESIDUAL_PER_GAP = 0.3
# The residual that is allowed to a triplet chosen from all, over its σ: triplets that are this weight's leave about 1e-6
# (measured at a condition number of 3).
MAX_RESIDUAL = 1e-2
# The largest element of |UᵀU - I| that is allowed to chosen vectors: up to 4e-4 come from a float32 Gram matrix.
MAX_ORTHOGONALITY_LOSS = 1e-3


def norms_of(route: str, w: Tensor, sigma: Tensor) -> Tensor:
    """The largest σ (L,) of w (L, N, K): the first of all σ (L, n), an estimate where these are a tail's."""
    return norm_estimate(w) if route == "tail" else sigma[:, 0]


def norm_estimate(w: Tensor, steps: int = 3) -> Tensor:
    """A lower estimate of the largest singular value, good to tens of percent: power iteration from the column sums."""
    v = w.sum(-2)[..., None] + torch.finfo(w.dtype).tiny
    for _ in range(steps):
        v = w.mT @ (w @ (v / torch.linalg.vector_norm(v, dim=-2, keepdim=True).clamp_min(torch.finfo(w.dtype).tiny)))
    return torch.linalg.vector_norm(v, dim=(-2, -1)).sqrt()


def spectrum_allows(route: Route, sigma: Tensor, norms: Tensor) -> list[bool]:
    """For each matrix: is its spectrum, as the route found it, one that the route resolves? sigma (L, n), norms (L,).

    A tail must be graded enough to be told apart. The smallest σ² of a Gram matrix must lie above the rounding error of
    the largest, and above zero: W's products with the basis are the other side's vectors times σ, which is nothing where
    σ is zero. A float32 SVD must resolve the smallest σ. A float64 SVD is the last resort.
    """
    if route.kind == "tail":
        return (norms >= MIN_TAIL_CONDITION * sigma[..., -1]).tolist()
    assert route.precision is not None
    eps = torch.finfo(route.precision).eps
    if route.kind == "gram":
        squares = sigma.double().square()
        accurate = eps * squares[..., 0] <= MAX_RELATIVE_ERROR * squares[..., -1]
        return (accurate & (squares[..., -1] > 0)).tolist()
    if route.precision == torch.float64:
        return [True] * sigma.shape[0]
    return (eps * sigma[..., 0] <= MAX_SVD_ERROR * sigma[..., -1]).tolist()


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
    w: Tensor,  # (L, N, K)
    norms: Tensor,  # (L,) of W, estimated
    sigma: Tensor,  # (L, n) of the tail
    u: Tensor,  # (L, N, s)
    vt: Tensor,  # (L, s, K)
    chosen_sigma: Tensor,  # (L, s)
    index: Tensor,  # (L, s) in the spectrum of W
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


def are_triplets(w: Tensor, norms: Tensor, u: Tensor, vt: Tensor, sigma: Tensor) -> list[bool]:
    """For each matrix: are these singular triplets of it, orthonormal, taken from all? norms (L,): its largest σ."""
    # A σ of 0 has no other mark than the rounding error.
    allowed = torch.maximum(MAX_RESIDUAL * sigma, rounding(w, norms)[..., None])
    good = (residuals(w, u, vt, sigma) <= allowed).all(-1)
    return (good & are_orthonormal(u, vt)).tolist()


def rounding(w: Tensor, norms: Tensor) -> Tensor:
    """The residual (L,) that rounding alone may leave of a triplet; norms (L,) of W."""
    return 8 * torch.finfo(w.dtype).eps * max(w.shape[-2:]) ** 0.5 * norms
