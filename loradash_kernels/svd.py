"""Truncated singular value decompositions of batches of matrices, from either end of the spectrum.

The tail end matters here: the directions that LoRA-Dash looks for are those with the smallest singular values, which a
conventional randomized SVD never sees. The inverse of W has a rapidly decaying spectrum exactly where the tail of W is
graded, so a few steps of subspace iteration with W⁻¹W⁻ᵀ find it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Triplets(NamedTuple):
    """Singular triplets in descending order of sigma: u (..., N, n), sigma (..., n), vt (..., n, K)."""

    u: Tensor
    sigma: Tensor
    vt: Tensor


def batched_randomized_svd(
    w: Tensor,  # (..., N, K)
    rank: int,
    *,
    end: str = "tail",
    oversample: int = 8,
    power_iters: int = 2,
    generator: torch.Generator | None = None,
) -> Triplets:
    """`rank` singular triplets of every matrix of a batch, from the small ("tail") or large ("head") end.

    Halko, Martinsson and Tropp, SIAM Review 2011, for the head; for the tail the same subspace iteration on the inverse,
    by LU factors (square w) or the R of a QR (rectangular w). Computed in float32, or float64 for float64 w. FLOPs per
    square n x n matrix: 2/3 n³ for the factors and 4 (power_iters + 1) n² (rank + oversample).

    Args:
        w: finite; singular matrices are allowed (pivots below the rounding error are raised to it).
        rank: 1 to min(N, K).
        oversample: extra columns of the sketch, dropped from the result.
        power_iters: steps of subspace iteration; each sharpens the separation between kept and dropped directions.
        generator: source of the Gaussian sketch; with the same one, the same triplets.

    Returns:
        u (..., N, rank), sigma (..., rank) descending, vt (..., rank, K).

    Raises:
        ValueError: fewer than two dimensions, a rank out of range, an unknown end, non-finite values.
    """
    if w.dim() < 2 or not w.dtype.is_floating_point:
        raise ValueError(f"w has shape {tuple(w.shape)} and dtype {w.dtype}; wanted floating (..., N, K)")
    short = min(w.shape[-2:])
    if not 1 <= rank <= short:
        raise ValueError(f"rank is {rank}; w {tuple(w.shape)} allows 1 to {short}")
    if end not in ("tail", "head"):
        raise ValueError(f'end must be "tail" or "head", got {end!r}')
    if not all_finite(w):
        raise ValueError("w has values that are not finite")
    wide = w if w.dtype == torch.float64 else w.float()
    if wide.shape[-2] < wide.shape[-1]:
        v, sigma, ut = _tall(wide.mT, rank, end, oversample, power_iters, generator)
        return Triplets(ut.mT, sigma, v.mT)
    return Triplets(*_tall(wide, rank, end, oversample, power_iters, generator))


def _tall(
    w: Tensor, rank: int, end: str, oversample: int, power_iters: int, generator: torch.Generator | None
) -> tuple[Tensor, Tensor, Tensor]:
    k = w.shape[-1]
    width = min(k, rank + oversample)
    sketch = torch.randn(*w.shape[:-2], k, width, dtype=w.dtype, device=w.device, generator=generator)
    if end == "head":
        return _head(w, sketch, rank, power_iters)
    return _tail(Inverse(w), sketch, rank, power_iters)


def _head(w: Tensor, sketch: Tensor, rank: int, power_iters: int) -> tuple[Tensor, Tensor, Tensor]:
    q = orthonormal(w @ sketch)
    for _ in range(power_iters):
        q = orthonormal(w @ orthonormal(w.mT @ q))
    u, sigma, vt = torch.linalg.svd(q.mT @ w, full_matrices=False)
    return (q @ u)[..., :rank], sigma[..., :rank], vt[..., :rank, :]


def _tail(inverse: Inverse, sketch: Tensor, rank: int, power_iters: int) -> tuple[Tensor, Tensor, Tensor]:
    z = orthonormal(sketch)
    for _ in range(power_iters):
        z = orthonormal(inverse.apply(orthonormal(inverse.apply_transposed(z))))
    # W⁻ᵀ Z = U Σ⁻¹ (Z V)ᵀ: its largest singular values are the smallest of W, to full relative accuracy.
    c = inverse.apply_transposed(z)
    reciprocal, v = torch.linalg.eigh(c.mT.double() @ c.double())  # ascending 1/σ²: descending σ
    v = v[..., -rank:].to(z.dtype)
    norms = reciprocal[..., -rank:].clamp_min(torch.finfo(torch.float64).tiny).sqrt().to(z.dtype)
    return inverse.left(c @ v / norms[..., None, :]), 1 / norms, (z @ v).mT


class Inverse:
    """W⁻¹ and W⁻ᵀ of tall matrices (..., N, K), N >= K, through LU factors where square, else through the R of a QR."""

    def __init__(self, w: Tensor) -> None:
        self._q: Tensor | None = None
        if w.shape[-2] == w.shape[-1]:
            self._lu, self._pivots, _ = torch.linalg.lu_factor_ex(w)
        else:
            self._q, self._lu = torch.linalg.qr(w)
            self._pivots = None
        # A zero pivot would turn the null space into inf; raised to the rounding error, it still dominates everything.
        diagonal = self._lu.diagonal(dim1=-2, dim2=-1)
        largest = diagonal.abs().amax(-1, keepdim=True)
        floor = torch.where(largest > 0, torch.finfo(w.dtype).eps * largest, 1e-6)
        diagonal.copy_(torch.where(diagonal.abs() < floor, floor, diagonal))

    def apply(self, b: Tensor) -> Tensor:
        """W⁻¹ B (square) or R⁻¹ B."""
        if self._pivots is None:
            return torch.linalg.solve_triangular(self._lu, b, upper=True)
        return torch.linalg.lu_solve(self._lu, self._pivots, b)

    def apply_transposed(self, b: Tensor) -> Tensor:
        """W⁻ᵀ B (square) or R⁻ᵀ B."""
        if self._pivots is None:
            return torch.linalg.solve_triangular(self._lu.mT, b, upper=False)
        return torch.linalg.lu_solve(self._lu, self._pivots, b, adjoint=True)

    def left(self, u: Tensor) -> Tensor:
        """Left singular vectors of W from those of the factor that is inverted."""
        return u if self._q is None else self._q @ u


def orthonormal(x: Tensor) -> Tensor:
    """An orthonormal basis of the columns of x (..., n, l)."""
    return torch.linalg.qr(x)[0]


def all_finite(x: Tensor) -> bool:
    """Is every element finite? A finite sum proves it in one pass without a mask."""
    return bool(torch.isfinite(x.sum())) or bool(torch.isfinite(x).all())
