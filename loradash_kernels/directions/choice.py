"""What is taken from a decomposition, and the check of it: the directions that an update changes most, or all triplets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .attempts import Attempt
from .checks import are_orthonormal, are_resolved, are_triplets
from .decompositions import Decomposition, TwoSided
from .kernels import kernels_for, on_device
from .linalg import select

# The triplets of the small end by which all are checked: a route that fails fails there first.
ENDS = 8


class Choice(NamedTuple):
    """Chosen directions of a batch of matrices, highest change rate first; index (L, s) in the descending spectrum of W."""

    u: Tensor  # (L, N, s)
    vt: Tensor  # (L, s, K)
    sigma: Tensor  # (L, s)
    rate: Tensor  # (L, s)
    # The name hides tuple.index.
    index: Tensor  # type: ignore[assignment]


def choose(
    found: Decomposition,
    a: Tensor,  # (L, r, K)
    b: Tensor,  # (L, N, r)
    s: int,
    scaling: float,
    eps: float,
) -> Choice:
    """The s directions of highest change rate, in the dtype of the factors."""
    rate, which = highest_rates(found, a, b, s, scaling, eps)
    u, sigma, vt = found.columns(which)
    u, vt, sigma, rate = (t.to(a.dtype).contiguous() for t in (u, vt, sigma, rate))
    return Choice(u, vt, sigma, rate, found.index(which))


def highest_rates(
    found: Decomposition, a: Tensor, b: Tensor, s: int, scaling: float, eps: float
) -> tuple[Tensor, Tensor]:
    """The s highest change rates |scaling · u_iᵀ B A v_i| / (σ_i + eps) and their positions, (L, s) each."""
    kernels = kernels_for(found.sigma)
    if kernels is not None and kernels.takes(found.sigma.shape[-1], b.shape[-1]):
        with on_device(found.sigma):
            return kernels.rates(*found.factors(a, b), s, scaling, eps, one_sided=found.one_sided)
    rates = (scaling * found.overlap(a, b)).abs() / (found.sigma + eps)
    return torch.topk(rates, s, dim=-1)


def choice_holds(route: str, w: Tensor, norms: Tensor, sigma: Tensor, choice: Choice) -> list[bool]:
    """For each matrix w (L, N, K), of norms (L,): are these its directions? sigma (L, n) are those they were chosen from.

    A tail's residuals are held against the gaps between its σ, those of triplets chosen from all against their own σ.
    """
    u, vt, chosen_sigma, _, index = choice
    if route == "tail":
        return are_resolved(w, norms, sigma, u, vt, chosen_sigma, index)
    return are_triplets(w, norms, u, vt, chosen_sigma)


@dataclass(frozen=True)
class BestDirections:
    """Takes the s directions of highest change rate under the updates a (L, r, K), b (L, N, r) of a batch."""

    a: Tensor
    b: Tensor
    s: int
    scaling: float
    eps: float

    def choose(self, attempt: Attempt) -> Choice:
        a, b = select(self.a, attempt.which), select(self.b, attempt.which)
        return choose(attempt.found, a, b, self.s, self.scaling, self.eps)

    def holds(self, attempt: Attempt, choice: Choice) -> Sequence[bool]:
        return choice_holds(attempt.route.kind, attempt.w, attempt.norms, attempt.found.sigma, choice)


class AllTriplets:
    """Takes all triplets that a route gives, both sides of them, in the dtype of the matrices."""

    @staticmethod
    def choose(attempt: Attempt) -> TwoSided:
        return TwoSided(*(t.to(attempt.w.dtype) for t in attempt.found.full()))

    @staticmethod
    def holds(attempt: Attempt, found: TwoSided) -> Sequence[bool]:
        u, sigma, vt = found.full()
        if attempt.route.kind == "tail":
            return are_orthonormal(u, vt).tolist()
        return are_triplets(attempt.w, sigma[:, 0], u[..., -ENDS:], vt[..., -ENDS:, :], sigma[..., -ENDS:])


class Untouched:
    """Takes a decomposition as a route gives it. The check of all triplets waits for those that are chosen later."""

    @staticmethod
    def choose(attempt: Attempt) -> Decomposition:
        return attempt.found

    @staticmethod
    def holds(attempt: Attempt, found: Decomposition) -> Sequence[bool]:
        if attempt.route.kind != "tail":
            return [True] * len(attempt.which)
        u, _, vt = found.full()
        return are_orthonormal(u, vt).tolist()
