"""Change rates and task-specific directions: what the pre-launch phase of LoRA-Dash measures (paper, section 4).

For every singular triplet (u_i, σ_i, v_i) of a frozen weight W (N, K), the change rate of an update ΔW = scaling · B A is
δ_i = |u_iᵀ ΔW v_i| / (σ_i + eps). ΔW is never formed: u_iᵀ ΔW v_i = scaling · rowwise((Uᵀ B) ⊙ (Vᵀ Aᵀ)), O((N + K) n r).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .arguments import checked_batch
from .choice import AllTriplets, BestDirections
from .decompose import decompose, in_order
from .linalg import full_precision
from .policy import routes_for, tail_rank


class ChangeRates(NamedTuple):
    """u (..., N, n), sigma (..., n) descending, vt (..., n, K), delta = u_iᵀ ΔW v_i (..., n), rate (..., n), and the
    route that computed them. n is min(N, K), or the tail's rank on the tail route."""

    u: Tensor
    sigma: Tensor
    vt: Tensor
    delta: Tensor
    rate: Tensor
    route: str


class Directions(NamedTuple):
    """The s directions of highest change rate, highest first: u (..., N, s), vt (..., s, K), sigma, rate (..., s), index
    (..., s) in the descending spectrum of W, and the route of each matrix of the flattened batch."""

    u: Tensor
    vt: Tensor
    sigma: Tensor
    rate: Tensor
    # The name hides tuple.index.
    index: Tensor  # type: ignore[assignment]
    routes: tuple[str, ...]


@full_precision()
def change_rates(
    weight: Tensor,  # (..., N, K)
    lora_a: Tensor,  # (..., r, K)
    lora_b: Tensor,  # (..., N, r)
    *,
    scaling: float = 1.0,
    eps: float = 1e-6,
    method: str = "auto",
    rank: int | None = None,
    generator: torch.Generator | None = None,
) -> ChangeRates:
    """Change rates of singular directions of W under ΔW = scaling · B A (paper, equation 7).

    Args:
        weight: finite, of any rank; a zero σ counts as 0, so its rate is |δ| / eps.
        method: "exact" gives all triplets, "randomized" the `rank` smallest, "auto" the tail where every matrix of the
            batch is graded enough for it, else all.
        rank: of the tail, n / 12 for n = min(N, K) by default, from 32 to 128, bounded by min(N, K).
        generator: of the tail's sketch; a fixed seed by default, so that the same input gives the same directions.

    Raises:
        ValueError: shapes that do not fit, r = 0, values that are not finite, an unknown method.
    """
    w, a, b = checked_batch(weight, lora_a, lora_b, method)

    (settled,) = decompose(
        w, routes_for(w, method, rank), AllTriplets.choose, AllTriplets.holds, generator, together=True
    )
    found = settled.result
    delta = scaling * found.overlap(a, b)
    rate = delta.abs() / (found.sigma + eps)
    batch = weight.shape[:-2]
    u, sigma, vt, delta, rate = (t.reshape(*batch, *t.shape[1:]) for t in (*found.full(), delta, rate))
    return ChangeRates(u, sigma, vt, delta, rate, str(settled.route))


@full_precision()
def task_specific_directions(
    weight: Tensor,  # (..., N, K)
    lora_a: Tensor,  # (..., r, K)
    lora_b: Tensor,  # (..., N, r)
    s: int = 8,
    *,
    scaling: float = 1.0,
    eps: float = 1e-6,
    method: str = "auto",
    rank: int | None = None,
    generator: torch.Generator | None = None,
) -> Directions:
    """The s singular directions of W with the highest change rates, batched over leading dimensions.

    `method="auto"` takes, for each matrix, the tail where the spectrum is graded and checks the residuals of what it
    chose against the gaps between singular values; else the Gram matrix; and the exact route where a check fails.
    "exact" always computes the whole spectrum, "randomized" never does. Arguments and errors are those of
    `change_rates`, and ValueError for s not in 1..min(N, K).
    """
    w, a, b = checked_batch(weight, lora_a, lora_b, method)
    n = min(w.shape[-2:])
    if not 1 <= s <= n:
        raise ValueError(f"s is {s}; weight {tuple(weight.shape)} allows 1 to {n}")
    if rank is not None and rank < s:
        raise ValueError(f"rank is {rank}; it must be at least s = {s}")

    best = BestDirections(a, b, s, scaling, eps)
    routes = routes_for(w, method, max(rank or tail_rank(n), s))
    found = list(in_order(decompose(w, routes, best.choose, best.holds, generator)))
    tensors = (torch.stack([choice[field][position] for _, choice, position in found]) for field in range(5))
    u, vt, sigma, rate, index = (t.reshape(*weight.shape[:-2], *t.shape[1:]) for t in tensors)
    # A graded matrix that comes to an SVD was given up by the tail.
    names = (f"{r}, escalated" if r.kind == "svd" and routes[0].kind == "tail" else str(r) for r, _, _ in found)
    return Directions(u, vt, sigma, rate, index, tuple(names))


def direction_recall(predicted: Tensor, true: Tensor) -> Tensor:
    """The share of the true directions that were predicted; indices (..., p) and (..., t), result (...)."""
    return (true[..., :, None] == predicted[..., None, :]).any(-1).double().mean(-1)


def direction_accuracy(predicted: Tensor, true: Tensor) -> Tensor:
    """The share of the predicted directions that are true; indices (..., p) and (..., t), result (...).

    The paper compares the top 8 predicted with the top 16 true (accuracy) and the top 4 true (recall).
    """
    return direction_recall(true, predicted)
