"""Singular triplets of a batch of matrices W (L, N, K), in the two forms that they come in, behind one interface."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .linalg import Triplets, select

# The largest condition number of a W whose basis is kept in half precision: triplets that are refined from it fail their
# check from 100 on.
MAX_HALF_CONDITION = 50.0


class Factors(NamedTuple):
    """What the overlaps u_iᵀ B A v_i are made of: rowwise((uᵀ b) ⊙ (vᵀ at)), over σ where `one_sided`."""

    u: Tensor  # (L, N, n)
    v: Tensor  # (L, K, n)
    sigma: Tensor  # (L, n)
    b: Tensor  # (L, N, r)
    at: Tensor  # (L, K, r)


class Compact(NamedTuple):
    """The tensors to keep of one matrix; a side is missing where it is W's product with the other."""

    u: Tensor | None  # (N, n)
    sigma: Tensor  # (n,)
    vt: Tensor | None  # (n, K)


class Decomposition(ABC):
    """Singular triplets of a batch, in descending order of σ: all of them, or those of the small end."""

    sigma: Tensor  # (L, n)
    one_sided: bool

    @abstractmethod
    def take(self, which: Sequence[int]) -> Decomposition:
        """The triplets of some matrices of the batch."""

    @abstractmethod
    def factors(self, a: Tensor, b: Tensor) -> Factors:
        """For a (L, r, K) and b (L, N, r)."""

    @abstractmethod
    def columns(self, which: Tensor) -> Triplets:
        """The triplets at the positions `which` (L, s): u (L, N, s), sigma (L, s), vt (L, s, K)."""

    @abstractmethod
    def index(self, which: Tensor) -> Tensor:
        """Where in the descending spectrum of W the positions `which` (L, s) lie."""

    @abstractmethod
    def full(self) -> Triplets:
        """The triplets with both sides."""

    @abstractmethod
    def compact(self, dtype: torch.dtype) -> Compact:
        """What is kept of a batch of one matrix, in the dtype of W or, where refinement makes it whole again, in float16."""

    def overlap(self, a: Tensor, b: Tensor) -> Tensor:
        """u_iᵀ B A v_i (L, n) for a (L, r, K) and b (L, N, r)."""
        u, v, sigma, near, far = self.factors(a, b)
        product = ((u.mT @ near) * (v.mT @ far)).sum(-1)
        return product / sigma.clamp_min(torch.finfo(sigma.dtype).tiny) if self.one_sided else product


class TwoSided(Decomposition):
    """Triplets as an SVD gives them: u (L, N, n), sigma (L, n), vt (L, n, K)."""

    one_sided = False

    def __init__(self, u: Tensor, sigma: Tensor, vt: Tensor) -> None:
        self.u, self.sigma, self.vt = u, sigma, vt

    def take(self, which: Sequence[int]) -> TwoSided:
        return TwoSided(*(select(t, which) for t in self.full()))

    def factors(self, a: Tensor, b: Tensor) -> Factors:
        return Factors(self.u, self.vt.mT, self.sigma, b.to(self.sigma.dtype), a.to(self.sigma.dtype).mT)

    def columns(self, which: Tensor) -> Triplets:
        return Triplets(chosen(self.u, which), self.sigma.gather(-1, which), chosen(self.vt.mT, which).mT)

    def index(self, which: Tensor) -> Tensor:
        return which + (min(self.u.shape[-2], self.vt.shape[-1]) - self.sigma.shape[-1])

    def full(self) -> Triplets:
        return Triplets(self.u, self.sigma, self.vt)

    def compact(self, dtype: torch.dtype) -> Compact:
        return Compact(*(t[0].to(dtype).contiguous() for t in self.full()))


class OneSided(Decomposition):
    """The vectors of the short side: those of the long side are W's products with them, over σ.

    W is held in the precision of the basis: float32 products with W would leave errors of eps · condition number.

    Args:
        w: (L, N, K).
        basis: (L, min(N, K), n), the vectors as columns.
        left: are they left singular vectors, which they are where N <= K?
        positions: (L, n) in the descending spectrum of W, of a basis that does not hold all of it.
    """

    one_sided = True

    def __init__(self, w: Tensor, basis: Tensor, sigma: Tensor, left: bool, positions: Tensor | None = None) -> None:
        self.w, self.basis, self.sigma, self.left, self.positions = w, basis, sigma, left, positions

    def take(self, which: Sequence[int]) -> OneSided:
        w, basis, sigma = (select(t, which) for t in (self.w, self.basis, self.sigma))
        return OneSided(w, basis, sigma, self.left, None if self.positions is None else select(self.positions, which))

    def factors(self, a: Tensor, b: Tensor) -> Factors:
        """vᵀ Aᵀ = uᵀ (W Aᵀ) / σ needs no long side."""
        a, b = a.to(self.sigma.dtype), b.to(self.sigma.dtype)
        near, far = (b, self.w @ a.mT) if self.left else (a.mT, self.w.mT @ b)
        return Factors(self.basis, self.basis, self.sigma, near, far)

    def columns(self, which: Tensor) -> Triplets:
        return self._both_sides(chosen(self.basis, which), self.sigma.gather(-1, which))

    def index(self, which: Tensor) -> Tensor:
        return which if self.positions is None else self.positions.gather(-1, which)

    def full(self) -> Triplets:
        return self._both_sides(self.basis, self.sigma)

    def compact(self, dtype: torch.dtype) -> Compact:
        if not bool(self.sigma[0, 0] <= MAX_HALF_CONDITION * self.sigma[0, -1]):
            return TwoSided(*self.full()).compact(dtype)
        basis, sigma = self.basis[0].half(), self.sigma[0].to(dtype)
        return Compact(basis.contiguous(), sigma, None) if self.left else Compact(None, sigma, basis.mT.contiguous())

    def _both_sides(self, near: Tensor, sigma: Tensor) -> Triplets:
        """The vectors of the long side are zero where σ is."""
        product = (self.w.mT if self.left else self.w) @ near
        far = product / sigma.clamp_min(torch.finfo(sigma.dtype).tiny)[..., None, :]
        return Triplets(near, sigma, far.mT) if self.left else Triplets(far, sigma, near.mT)


def chosen(columns: Tensor, which: Tensor) -> Tensor:
    """The columns (L, n, s) of (L, n, m) at the positions `which` (L, s)."""
    return columns.gather(-1, which[..., None, :].expand(*columns.shape[:-1], which.shape[-1]))


def gram_decomposition(w: Tensor, precision: torch.dtype) -> OneSided:
    """All triplets of w (L, N, K) by the eigenvectors of the Gram matrix of its short side n.

    2 N K n FLOPs for the Gram matrix, about 9 n³ for its eigenvectors.
    """
    left = w.shape[-2] <= w.shape[-1]
    wide = w.to(precision)
    squares, basis = torch.linalg.eigh(_lower_gram(wide if left else wide.mT))
    return OneSided(wide, basis.flip(-1), squares.flip(-1).clamp_min(0).sqrt(), left)


def _lower_gram(x: Tensor, parts: int = 4) -> Tensor:
    """The lower triangle of x xᵀ (L, n, n), which is all that eigh reads, in blocks of rows: 5/8 of the FLOPs."""
    n = x.shape[-2]
    gram = x.new_zeros(*x.shape[:-1], n)
    edges = [n * i // parts for i in range(parts + 1)]
    for first, last in itertools.pairwise(edges):
        gram[..., first:last, :last] = x[..., first:last, :] @ x[..., :last, :].mT
    return gram
