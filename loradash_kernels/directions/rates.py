"""Change rates and task-specific directions: what the pre-launch phase of LoRA-Dash measures (paper, section 4).

For every singular triplet (u_i, σ_i, v_i) of a frozen weight W (N, K), the change rate of an update ΔW = scaling · B A is
δ_i = |u_iᵀ ΔW v_i| / (σ_i + eps). ΔW is never formed: u_iᵀ ΔW v_i = scaling · rowwise((Uᵀ B) ⊙ (Vᵀ Aᵀ)), O((N + K) n r).

The routes to the triplets are those of `routes`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from .linalg import Triplets, all_finite, full_precision, select, triton_kernels
from .routes import (
    Half,
    Route,
    are_orthonormal,
    are_resolved,
    are_triplets,
    follow,
    is_graded,
    norm_estimate,
    routes_of,
    tail_rank,
    tail_triplets,
)

METHODS = ("auto", "exact", "randomized")
ENDS = 8  # triplets of the small end, where a route that fails fails first


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
    index: Tensor  # type: ignore[assignment]  # hides tuple.index
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
    spectrum, route = None, "svd"
    if method == "randomized" or (method == "auto" and _square(w)):
        spectrum, route = tail_triplets(w, rank, generator), "tail"
        kept = is_graded(norm_estimate(w), spectrum) & are_orthonormal(spectrum.u, spectrum.vt)
        spectrum = spectrum if method == "randomized" or bool(kept.all()) else None
    if spectrum is None:
        spectrum, route = _all_triplets(w, method)
    delta = scaling * _overlap(spectrum, a, b)
    batch = weight.shape[:-2]
    rate = delta.abs() / (spectrum.sigma + eps)
    u, sigma, vt, delta, rate = (t.reshape(*batch, *t.shape[1:]) for t in (*spectrum, delta, rate))
    return ChangeRates(u, sigma, vt, delta, rate, route)


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

    search = _Search(w, a, b, s, scaling, eps, todo=list(range(w.shape[0])))
    if method == "randomized" or (method == "auto" and _square(w) and search.todo):
        tail = tail_triplets(w, max(rank or tail_rank(n), s), generator)
        if method == "randomized":
            search.settle(search.todo, tail, "tail")
        else:
            norms = norm_estimate(w)
            kept = [i for i in search.todo if bool(is_graded(norms, tail)[i])]
            check: Check = lambda which, chosen: are_resolved(  # noqa: E731
                select(w, which), select(norms, which), select(tail.sigma, which), *chosen
            )
            search.settle(kept, tail.take(kept), "tail", check)
    if search.todo:
        search.through(routes_of(w, method), ", escalated" if method == "auto" and _square(w) else "")
    return search.directions(weight.shape[:-2])


Chosen = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # u, vt, sigma, rate, index of a part of the batch
Check = Callable[[list[int], Chosen], list[bool]]


@dataclass
class _Search:
    """Directions of the matrices of a batch, and the numbers of those for which they are still sought."""

    w: Tensor
    a: Tensor
    b: Tensor
    s: int
    scaling: float
    eps: float
    todo: list[int]
    found: dict[int, tuple[tuple[Tensor, ...], str]] = field(default_factory=dict)

    def settle(self, which: list[int], spectrum: Triplets | Half, route: str, check: Check | None = None) -> None:
        """Chooses for the matrices `which`, whose triplets are in `spectrum`, and keeps what passes the check."""
        if not which:
            return
        few = (select(t, which) for t in (self.w, self.a, self.b))
        chosen = choose_best(spectrum, *few, self.s, self.scaling, self.eps)  # type: ignore[call-arg, arg-type]
        good = check(which, chosen) if check else [True] * len(which)
        for i, matrix in enumerate(which):
            if good[i]:
                self.found[matrix] = tuple(t[i] for t in chosen), route
        self.todo = [i for i in self.todo if i not in self.found]

    def through(self, routes: tuple[Route, ...], mark: str) -> None:
        """Takes route after route until every matrix has its directions; the last is not checked."""
        for route in routes:
            trying = self.todo
            spectrum, allowed = follow(route, select(self.w, trying))
            kept = [position for position, ok in enumerate(allowed) if ok]
            check = None if route == routes[-1] else self._are_triplets(spectrum.sigma[:, 0], trying)
            name = f"{route}{mark}" if route.kind == "svd" else str(route)
            self.settle([trying[p] for p in kept], spectrum.take(kept), name, check)
            if not self.todo:
                return

    def _are_triplets(self, largest: Tensor, trying: list[int]) -> Check:
        def check(which: list[int], chosen: Chosen) -> list[bool]:
            norms = select(largest, [trying.index(i) for i in which])
            return are_triplets(select(self.w, which), norms, *chosen[:3])

        return check

    def directions(self, batch: torch.Size) -> Directions:
        """Of the whole batch, in its shape."""
        chosen = [self.found[i] for i in range(self.w.shape[0])]
        u, vt, sigma, rate, index = (
            torch.stack([tensors[f] for tensors, _ in chosen]).reshape(*batch, *chosen[0][0][f].shape) for f in range(5)
        )
        return Directions(u, vt, sigma, rate, index, tuple(route for _, route in chosen))


def direction_recall(predicted: Tensor, true: Tensor) -> Tensor:
    """The share of the true directions that were predicted; indices (..., p) and (..., t), result (...)."""
    return (true[..., :, None] == predicted[..., None, :]).any(-1).double().mean(-1)


def direction_accuracy(predicted: Tensor, true: Tensor) -> Tensor:
    """The share of the predicted directions that are true; indices (..., p) and (..., t), result (...).

    The paper compares the top 8 predicted with the top 16 true (accuracy) and the top 4 true (recall).
    """
    return direction_recall(true, predicted)


# --- checks of the arguments -----------------------------------------------------------------------------------------


def checked_batch(weight: Tensor, lora_a: Tensor, lora_b: Tensor, method: str) -> tuple[Tensor, Tensor, Tensor]:
    """The batch flattened, in float32 (float64 if any is): (L, N, K), (L, r, K), (L, N, r)."""
    if method not in METHODS:
        raise ValueError(f"method must be one of {METHODS}, got {method!r}")
    if weight.dim() < 2:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; wanted (..., N, K)")
    *batch, n, k = weight.shape
    r = lora_a.shape[-2] if lora_a.dim() >= 2 else 0
    if r == 0 or lora_a.shape != (*batch, r, k):
        raise ValueError(
            f"lora_a has shape {tuple(lora_a.shape)}; wanted ({', '.join(map(str, (*batch, 'r >= 1', k)))})"
        )
    if lora_b.shape != (*batch, n, r):
        raise ValueError(f"lora_b has shape {tuple(lora_b.shape)}; wanted {(*batch, n, r)}")
    for name, t in (("weight", weight), ("lora_a", lora_a), ("lora_b", lora_b)):
        if not all_finite(t):
            raise ValueError(f"{name} has values that are not finite")
    dtype = torch.float64 if torch.float64 in (weight.dtype, lora_a.dtype, lora_b.dtype) else torch.float32
    with torch.no_grad():
        flat = [t.detach().to(dtype).reshape(-1, *t.shape[-2:]) for t in (weight, lora_a, lora_b)]
    return flat[0], flat[1], flat[2]


def _square(w: Tensor) -> bool:
    return w.shape[-2] == w.shape[-1]


def _all_triplets(w: Tensor, method: str) -> tuple[Triplets, str]:
    """All triplets of a batch by one route, the first that every matrix allows and whose smallest triplets hold."""
    routes = routes_of(w, method)
    for route in routes:
        found, allowed = follow(route, w)
        if all(allowed):
            full = Triplets(*(t.to(w.dtype) for t in (found.full() if isinstance(found, Half) else found)))
            ends = Triplets(full.u[..., -ENDS:], full.sigma[..., -ENDS:], full.vt[..., -ENDS:, :])
            if route == routes[-1] or all(are_triplets(w, full.sigma[..., 0], ends.u, ends.vt, ends.sigma)):
                break
    return full, str(route)


# --- rates and choice ------------------------------------------------------------------------------------------------


def _factors(spectrum: Triplets | Half, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """left (L, N, n), right (L, K, n), sigma (L, n), B (L, N, r) and Aᵀ (L, K, r), with which

    u_iᵀ B A v_i = rowwise((leftᵀ B) ⊙ (rightᵀ Aᵀ)); of a `Half`, over σ: vᵀ Aᵀ = uᵀ (W Aᵀ) / σ needs no long side.
    """
    a, b = a.to(spectrum.sigma.dtype), b.to(spectrum.sigma.dtype)
    if isinstance(spectrum, Triplets):
        return spectrum.u, spectrum.vt.mT, spectrum.sigma, b, a.mT
    near, far = (b, spectrum.w @ a.mT) if spectrum.left else (a.mT, spectrum.w.mT @ b)
    return spectrum.basis, spectrum.basis, spectrum.sigma, near, far


def _overlap(spectrum: Triplets | Half, a: Tensor, b: Tensor) -> Tensor:
    """u_iᵀ B A v_i (L, n)."""
    left, right, sigma, near, far = _factors(spectrum, a, b)
    product = ((left.mT @ near) * (right.mT @ far)).sum(-1)
    return product / sigma.clamp_min(torch.finfo(sigma.dtype).tiny) if isinstance(spectrum, Half) else product


def choose_best(
    spectrum: Triplets | Half, w: Tensor, a: Tensor, b: Tensor, s: int, scaling: float, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """u (L, N, s), vt (L, s, K), sigma, rate and index (L, s) of the highest rates, in the dtype of w (L, N, K)."""
    kernels = triton_kernels(spectrum.sigma)
    if kernels is not None and kernels.takes(spectrum.sigma.shape[-1], b.shape[-1]):
        best, local = kernels.rates(*_factors(spectrum, a, b), s, scaling, eps, half=isinstance(spectrum, Half))
    else:
        best, local = ((scaling * _overlap(spectrum, a, b)).abs() / (spectrum.sigma + eps)).topk(s, dim=-1)
    sigma = spectrum.sigma.gather(-1, local)
    columns: Callable[[Tensor], Tensor] = lambda t: t.gather(-1, local[..., None, :].expand(*t.shape[:-1], s))  # noqa: E731
    if isinstance(spectrum, Triplets):
        u, v = columns(spectrum.u), columns(spectrum.vt.mT)
    else:
        near = columns(spectrum.basis)
        far = spectrum.other(near, sigma)
        u, v = (near, far) if spectrum.left else (far, near)
    index = local + (min(w.shape[-2:]) - spectrum.sigma.shape[-1])
    u, vt, sigma, best = (t.to(w.dtype).contiguous() for t in (u, v.mT, sigma, best))
    return u, vt, sigma, best, index
