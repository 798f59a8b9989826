"""Truncated singular value decompositions of batches of matrices, from either end of the spectrum.

The tail end matters here: the directions that LoRA-Dash looks for are those with the smallest singular values, which a
conventional randomized SVD never sees. The inverse of W has a rapidly decaying spectrum exactly where the tail of W is
graded, so a few steps of subspace iteration with W⁻¹W⁻ᵀ find it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .kernels import kernels_for, on_device
from .linalg import Triplets, aligned, all_finite, cholesky_qr, full_precision, orthonormal


@full_precision()
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
    if end == "head":
        return _head(w, _sketched(w, width, generator), rank, power_iters)
    # One for all matrices: what a matrix gets does not depend on the batch that it is in.
    sketch = torch.randn(k, width, dtype=w.dtype, device=w.device, generator=generator)
    return _tail(Inverse(w), sketch.expand(*w.shape[:-2], k, width), rank, power_iters)


def _sketched(w: Tensor, width: int, generator: torch.Generator | None) -> Tensor:
    """W times a Gaussian matrix (K, width), which the kernel draws as it goes."""
    kernels = kernels_for(w)
    if kernels is None:
        return w @ torch.randn(w.shape[-1], width, dtype=w.dtype, device=w.device, generator=generator)
    seed = torch.empty(2, dtype=torch.int64, device=w.device).random_(generator=generator)
    with on_device(w):
        return kernels.sketch(w.reshape(-1, *w.shape[-2:]), seed, width).view(*w.shape[:-1], width)


def _head(w: Tensor, range_: Tensor, rank: int, power_iters: int) -> tuple[Tensor, Tensor, Tensor]:
    q = orthonormal(range_)
    for _ in range(power_iters):
        q = orthonormal(w @ orthonormal(w.mT @ q))
    u, sigma, vt = torch.linalg.svd(q.mT @ w, full_matrices=False)
    return (q @ u)[..., :rank], sigma[..., :rank], vt[..., :rank, :]


def _tail(inverse: Inverse, sketch: Tensor, rank: int, power_iters: int) -> tuple[Tensor, Tensor, Tensor]:
    # A Gaussian sketch is well conditioned as it is.
    z = sketch
    for _ in range(power_iters):
        z = orthonormal(inverse.apply(orthonormal(inverse.apply_transposed(z))))
    if power_iters == 0:
        z = orthonormal(z)
    # W⁻ᵀ Z = U Σ⁻¹ (Z V)ᵀ: its largest singular values are the smallest of W, to full relative accuracy.
    c = inverse.apply_transposed(z)
    norms, v = _right_singular(c, rank)
    # Where W is singular, the null space's vectors, first here and exact, stand in all the others by rounding.
    image = c @ v / norms[..., None, :]
    u = aligned(orthonormal(image), image)
    # The inverse has its largest first; descending σ is the other way round.
    return inverse.left(u.flip(-1)), 1 / norms.flip(-1), (z @ v).flip(-1).mT


def _right_singular(c: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The `rank` largest singular values (..., rank), descending, and right vectors (..., l, rank) of c (..., n, l)."""
    kernels = kernels_for(c)
    if kernels is not None:
        _, r = cholesky_qr(c)
        with on_device(c):
            sigma, vt, converged = kernels.jacobi(r.float().reshape(-1, *r.shape[-2:]))
        if bool(converged.all()):
            largest = sigma.view(*c.shape[:-2], -1)[..., :rank]
            return largest.clamp_min(torch.finfo(c.dtype).tiny), vt.view(r.shape)[..., :rank, :].mT
    wide = c.double()
    squares, v = torch.linalg.eigh(wide.mT @ wide)
    v, sigma = v[..., -rank:].flip(-1).to(c.dtype), squares[..., -rank:].flip(-1)
    return sigma.clamp_min(torch.finfo(torch.float64).tiny).sqrt().to(c.dtype), v


class Inverse:
    """W⁻¹ and W⁻ᵀ of tall matrices (..., N, K), N >= K, through LU factors where square, else through the R of a QR."""

    def __init__(self, w: Tensor) -> None:
        self._q: Tensor | None = None
        self._pivots: Tensor | None = None
        if w.shape[-2] == w.shape[-1]:
            # Wᵀ is factored: the rows of W are the columns that LAPACK wants, and transposing takes half as long as factoring.
            self._lu, self._pivots = _lu_factors(w.mT)
        else:
            self._q, self._lu = torch.linalg.qr(w)
        # A zero pivot would turn the null space into inf; raised to the rounding error, it still dominates everything.
        diagonal = self._lu.diagonal(dim1=-2, dim2=-1)
        largest = diagonal.abs().amax(-1, keepdim=True)
        floor = torch.where(largest > 0, torch.finfo(w.dtype).eps * largest, 1e-6)
        diagonal.copy_(torch.where(diagonal.abs() < floor, floor, diagonal))

    def apply(self, b: Tensor) -> Tensor:
        """W⁻¹ B (square) or R⁻¹ B."""
        if self._pivots is None:
            return torch.linalg.solve_triangular(self._lu, b, upper=True)
        return torch.linalg.lu_solve(self._lu, self._pivots, b, adjoint=True)

    def apply_transposed(self, b: Tensor) -> Tensor:
        """W⁻ᵀ B (square) or R⁻ᵀ B."""
        if self._pivots is None:
            return torch.linalg.solve_triangular(self._lu.mT, b, upper=False)
        return torch.linalg.lu_solve(self._lu, self._pivots, b)

    def left(self, u: Tensor) -> Tensor:
        """The left singular vectors of W, from those of the factor that is inverted."""
        return u if self._q is None else self._q @ u


def _lu_factors(w: Tensor) -> tuple[Tensor, Tensor]:
    """LU (..., n, n) and pivots (..., n).

    On the CPU one matrix is factored at a time: after torch.set_num_threads, MKL's factors of a batch, which PyTorch makes in
    parallel, are garbage (seen with PyTorch 2.13: pivots outside of 1..n). They are stored by columns, as solving wants.
    """
    if w.device.type != "cpu":
        factors, order, _ = torch.linalg.lu_factor_ex(w)
        return factors, order
    lu = torch.empty_like(w.mT, memory_format=torch.contiguous_format).mT
    pivots = w.new_empty(w.shape[:-1], dtype=torch.int32)
    info = torch.empty(0, dtype=torch.int32)
    flat = (t.view(-1, *t.shape[w.dim() - 2 :]) for t in (w.mT.contiguous(), lu.mT, pivots))
    for matrix, factors, order in zip(*flat, strict=True):
        torch.linalg.lu_factor_ex(matrix.mT, out=(factors.mT, order, info))
    return lu, pivots
