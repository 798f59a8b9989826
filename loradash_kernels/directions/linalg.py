"""Linear algebra of batches of matrices: orthonormal bases, precision, selection."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .kernels import factors_in_batches

# The largest element of |QᵀQ - I| that passes, in float64.
ORTHOGONAL = 1e-12
# Passes of CholeskyQR: two do for condition numbers up to 1e7, one or two shifted ones come before where it is larger.
PASSES = 4


class Triplets(NamedTuple):
    """Singular triplets in descending order of sigma: u (..., N, n), sigma (..., n), vt (..., n, K)."""

    u: Tensor
    sigma: Tensor
    vt: Tensor


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """float32 products in float32, whatever torch.set_float32_matmul_precision allows: the tail drowns in TF32's errors."""
    cuda = torch.backends.cuda.matmul
    # PyTorch before 2.9 has one setting for all.
    if not hasattr(cuda, "fp32_precision"):
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)
        return
    backends: list[Any] = [cuda, torch.backends.mkldnn.matmul]  # type: ignore[attr-defined]
    allowed = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, precision in zip(backends, allowed, strict=True):
            backend.fp32_precision = precision


def orthonormal(x: Tensor) -> Tensor:
    """An orthonormal basis of the columns of x (..., n, l), n >= l.

    Householder's QR on the CPU, where LAPACK is as fast; Cholesky's on a GPU, whose library runs the Householder QRs of a
    batch one after the other, while every step of Cholesky's is a batched product or solve.
    """
    if factors_in_batches(x.device):
        return cholesky_qr(x)[0].to(x.dtype)
    return torch.linalg.qr(x)[0]


def aligned(q: Tensor, x: Tensor) -> Tensor:
    """The columns of q, negated where they point against those of x."""
    return torch.where((q * x).sum(-2, keepdim=True) < 0, -q, q)


def cholesky_qr(x: Tensor) -> tuple[Tensor, Tensor]:
    """Q (..., n, l) with orthonormal columns and the upper triangular R (..., l, l) of x (..., n, l), in float64.

    CholeskyQR2 (Yamamoto et al., ETNA 2015) on columns of equal norm; where a Gram matrix is not positive definite to
    rounding, a shifted pass comes first (Fukaya et al., SISC 2020). The loss of orthogonality is measured before every
    pass; matrices that have not converged after the last (deficient ones) are factored by Householder's QR.
    4 n l² FLOPs a pass, all in products and triangular solves.
    """
    n, width = x.shape[-2:]
    wide = x.double()
    norms = torch.linalg.vector_norm(wide, dim=-2)
    norms = torch.where(norms > 0, norms, 1.0)
    q, r = wide / norms[..., None, :], torch.diag_embed(norms)
    identity = torch.eye(width, dtype=torch.float64, device=x.device)
    shift = 11 * (n * width + width * (width + 1)) * torch.finfo(torch.float64).eps * width * identity
    for _ in range(PASSES):
        gram = q.mT @ q
        if not bool((orthogonality_loss(gram) > ORTHOGONAL).any()):
            return q, r
        factor, failed = torch.linalg.cholesky_ex(gram)
        if bool(failed.any()):
            shifted, _ = torch.linalg.cholesky_ex(gram + shift)
            factor = torch.where((failed > 0)[..., None, None], shifted, factor)
        q = torch.linalg.solve_triangular(factor, q.mT, upper=False).mT
        r = factor.mT @ r
    # A loss of NaN counts as lost.
    lost = ~(orthogonality_loss(q.mT @ q) <= ORTHOGONAL)
    if bool(lost.any()):
        q[lost], r[lost] = torch.linalg.qr(wide[lost])
    return q, r


def orthogonality_loss(gram: Tensor) -> Tensor:
    """The largest element of |QᵀQ - I| (...), from QᵀQ (..., l, l)."""
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    return (gram - identity).abs().amax((-2, -1))


def select(t: Tensor, which: Sequence[int]) -> Tensor:
    """Some matrices of a batch, in ascending order; the batch itself, not a copy, where all are meant."""
    return t if len(which) == t.shape[0] else t[list(which)]


def all_finite(x: Tensor) -> bool:
    """Is every element finite? A finite sum proves it in one pass without a mask."""
    return bool(torch.isfinite(x.sum())) or bool(torch.isfinite(x).all())
