"""The choice of directions: the triplets of a decomposition that an update changes most, and the check of them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .checks import are_resolved, are_triplets
from .decompositions import Decomposition
from .kernels import kernels_for


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
        return kernels.rates(*found.factors(a, b), s, scaling, eps, one_sided=found.one_sided)
    rates = (scaling * found.overlap(a, b)).abs() / (found.sigma + eps)
    return torch.topk(rates, s, dim=-1)


def choice_holds(route_kind: str, w: Tensor, norms: Tensor, sigma: Tensor, choice: Choice) -> list[bool]:
    """For each matrix w (L, N, K), of norms (L,): are these its directions? sigma (L, n) are those they were chosen from.

    A tail's residuals are held against the gaps between its σ, those of triplets chosen from all against their own σ.
    """
    u, vt, chosen_sigma, _, index = choice
    if route_kind == "tail":
        return are_resolved(w, norms, sigma, u, vt, chosen_sigma, index)
    return are_triplets(w, norms, u, vt, chosen_sigma)
