"""Change rates and task-specific directions: what the pre-launch phase of LoRA-Dash measures (paper, section 4).

For every singular triplet (u_i, σ_i, v_i) of a frozen weight W (N, K), the change rate of an update ΔW = scaling · B A is
δ_i = |u_iᵀ ΔW v_i| / (σ_i + eps). ΔW is never formed: u_iᵀ ΔW v_i = scaling · rowwise((Uᵀ B) ⊙ (Vᵀ Aᵀ)), O((N + K) n r).

Three routes to the triplets:

- tail: the small end of a graded spectrum by a randomized SVD of the inverse. On square layers of trained transformers
  (condition number above a thousand) n / 12 triplets hold the top 8 directions.
- gram: all triplets from the eigenvectors of the Gram matrix of the short side, in the precision that its condition
  number asks for. Exact on rectangular layers, whose spectrum is flat at the small end and where the tail misleads.
- svd: LAPACK, where neither will do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .svd import Triplets, all_finite, batched_randomized_svd

METHODS = ("auto", "exact", "randomized")
TAIL_FRACTION = 12  # the tail route takes the last n / 12 triplets, at least 32 of them,
MIN_TAIL = 32
TAIL_POWER_ITERS = 3  # 3 steps of subspace iteration and 8 columns of oversampling: 99.5% of the top 8 directions;
SMALL, SMALL_POWER_ITERS = 1024, 6  # below, steps cost less than sending a layer to the full route
MIN_TAIL_CONDITION = 300.0  # below, the small end is too flat to be told apart by the tail route
MAX_RELATIVE_ERROR = 2e-4  # of the smallest σ² from a Gram matrix: eps · condition²
MAX_RESIDUAL_PER_GAP = 0.3  # of a chosen triplet; 0.03 at most where the tail route is right, above 5 where it is wrong


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
        rank: of the tail, max(32, min(N, K) / 12) by default, bounded by min(N, K).
        generator: of the tail's sketch; a fixed seed by default, so that the same input gives the same directions.

    Raises:
        ValueError: shapes that do not fit, r = 0, values that are not finite, an unknown method.
    """
    w, a, b = checked_batch(weight, lora_a, lora_b, method)
    spectrum, route = None, "svd"
    if method == "randomized" or (method == "auto" and _square(w)):
        spectrum, route = tail_triplets(w, rank, generator), "tail"
        if method == "auto" and not bool(is_graded(w, spectrum).all()):
            spectrum = None
    if spectrum is None:
        spectrum, route = _full(w, method == "exact")
    delta = scaling * _overlap(spectrum, a, b)
    batch = weight.shape[:-2]
    rate = delta.abs() / (spectrum.sigma + eps)
    u, sigma, vt, delta, rate = (t.reshape(*batch, *t.shape[1:]) for t in (*spectrum, delta, rate))
    return ChangeRates(u, sigma, vt, delta, rate, route)


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

    found: dict[int, tuple[Tensor, ...]] = {}
    routes: dict[int, str] = {}

    def settle(which: list[int], spectrum: Triplets | Half, route: str, check: bool) -> list[int]:
        """Keeps the choice of each matrix of `which` that passes; returns the others."""
        chosen = choose_best(spectrum, w[which], a[which], b[which], s, scaling, eps)
        good = are_resolved(w[which], spectrum.sigma, *chosen) if check else [True] * len(which)
        for i, matrix in enumerate(which):
            if good[i]:
                found[matrix], routes[matrix] = tuple(t[i] for t in chosen), route
        return [m for m, g in zip(which, good, strict=True) if not g]

    todo = list(range(w.shape[0]))
    if method == "randomized" or (method == "auto" and _square(w) and todo):
        tail = tail_triplets(w, max(rank or max(MIN_TAIL, n // TAIL_FRACTION), s), generator)
        if method == "randomized":
            todo = settle(todo, tail, "tail", check=False)
        else:
            graded = is_graded(w, tail).tolist()
            kept = [i for i in todo if graded[i]]
            failed = settle(kept, Triplets(*(t[kept] for t in tail)), "tail", check=True) if kept else []
            todo = sorted(failed + [i for i in todo if not graded[i]])
    escalated = method == "auto" and _square(w)
    if todo and method != "randomized":
        for precision in gram_precisions(w, method):
            half = gram_half(w[todo], precision)
            accurate = is_accurate(half.sigma, precision)
            good = [i for i, ok in zip(todo, accurate, strict=True) if ok]
            if good:
                picked = [p for p, ok in enumerate(accurate) if ok]
                settle(good, half.take(picked), f"gram {str(precision).removeprefix('torch.')}", check=False)
            todo = [i for i, ok in zip(todo, accurate, strict=True) if not ok]
            if not todo:
                break
    if todo:
        svd = Triplets(*torch.linalg.svd(w[todo], full_matrices=False))
        settle(todo, svd, "svd, escalated" if escalated else "svd", check=False)

    batch = weight.shape[:-2]
    order = range(w.shape[0])
    u, vt, sigma, rate, index = (
        torch.stack([found[i][f] for i in order]).reshape(*batch, *found[0][f].shape) for f in range(5)
    )
    return Directions(u, vt, sigma, rate, index, tuple(routes[i] for i in order))


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


# --- the tail --------------------------------------------------------------------------------------------------------


def tail_triplets(w: Tensor, rank: int | None, generator: torch.Generator | None) -> Triplets:
    n = min(w.shape[-2:])
    if generator is None:
        generator = torch.Generator(w.device).manual_seed(0)
    rank = min(n, rank or max(MIN_TAIL, n // TAIL_FRACTION))
    power_iters = TAIL_POWER_ITERS if n >= SMALL else SMALL_POWER_ITERS
    return batched_randomized_svd(w, rank, power_iters=power_iters, generator=generator)


def _norm_estimate(w: Tensor, steps: int = 3) -> Tensor:
    """A lower estimate of the largest singular value, good to tens of percent: power iteration from the column sums."""
    v = w.sum(-2)[..., None] + torch.finfo(w.dtype).tiny
    for _ in range(steps):
        v = w.mT @ (w @ (v / torch.linalg.vector_norm(v, dim=-2, keepdim=True).clamp_min(torch.finfo(w.dtype).tiny)))
    return torch.linalg.vector_norm(v, dim=(-2, -1)).sqrt()


def is_graded(w: Tensor, tail: Triplets) -> Tensor:
    """(L,) bool: is the condition number large enough for the tail to be told apart?"""
    return _norm_estimate(w) >= MIN_TAIL_CONDITION * tail.sigma[..., -1]


def residuals(w: Tensor, u: Tensor, vt: Tensor, sigma: Tensor) -> Tensor:
    """The larger of ‖W v_i - σ_i u_i‖ and ‖Wᵀ u_i - σ_i v_i‖ (..., s)."""
    left = torch.linalg.vector_norm(w @ vt.mT - u * sigma[..., None, :], dim=-2)
    right = torch.linalg.vector_norm(w.mT @ u - vt.mT * sigma[..., None, :], dim=-2)
    return torch.maximum(left, right)


def are_resolved(
    w: Tensor, sigma: Tensor, u: Tensor, vt: Tensor, chosen_sigma: Tensor, rate: Tensor, index: Tensor
) -> list[bool]:
    """For each matrix: are the residuals of all chosen triplets small against the gaps to their neighbours?

    A residual larger than the gap means a mixture of neighbours. Singular values that are equal up to rounding have no
    directions of their own, so rounding is allowed for.
    """
    spacing = (sigma[..., :-1] - sigma[..., 1:]).abs()
    edge = torch.full_like(sigma[..., :1], torch.inf)
    gaps = torch.minimum(torch.cat((edge, spacing), -1), torch.cat((spacing, edge), -1))
    local = index - (min(w.shape[-2:]) - sigma.shape[-1])
    rounding = 8 * torch.finfo(w.dtype).eps * max(w.shape[-2:]) ** 0.5 * _norm_estimate(w)
    allowed = torch.maximum(MAX_RESIDUAL_PER_GAP * gaps.gather(-1, local), rounding[..., None])
    return (residuals(w, u, vt, chosen_sigma) <= allowed).all(-1).tolist()


# --- the Gram matrix -------------------------------------------------------------------------------------------------


class Half:
    """All singular values, and the vectors of the short side only: those of the long side are W's products with them."""

    def __init__(self, w: Tensor, basis: Tensor, sigma: Tensor, left: bool) -> None:
        self.w, self.basis, self.sigma, self.left = w, basis, sigma, left  # basis (L, n, n), columns

    def take(self, which: list[int]) -> Half:
        return Half(self.w[which], self.basis[which], self.sigma[which], self.left)

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
    squares, basis = torch.linalg.eigh(wide @ wide.mT if left else wide.mT @ wide)
    sigma = squares.flip(-1).clamp_min(0).sqrt()
    return Half(w, basis.flip(-1).to(w.dtype), sigma.to(w.dtype), left)


def gram_precisions(w: Tensor, method: str) -> tuple[torch.dtype, ...]:
    """The precisions worth trying, in order; none for "exact" where one SVD costs less."""
    if method == "exact" and max(w.shape[-2:]) < 2 * min(w.shape[-2:]):
        return ()
    return (torch.float64,) if w.dtype == torch.float64 else (torch.float32, torch.float64)


def is_accurate(sigma: Tensor, precision: torch.dtype) -> list[bool]:
    """For each matrix: is the smallest σ² of its Gram matrix above the rounding error of the largest?"""
    squares = sigma.double().square()
    return (torch.finfo(precision).eps * squares[..., 0] <= MAX_RELATIVE_ERROR * squares[..., -1]).tolist()


def _full(w: Tensor, exact: bool) -> tuple[Triplets, str]:
    """All triplets of a batch by one route."""
    for precision in gram_precisions(w, "exact" if exact else "auto"):
        half = gram_half(w, precision)
        if all(is_accurate(half.sigma, precision)):
            return half.full(), f"gram {str(precision).removeprefix('torch.')}"
    return Triplets(*torch.linalg.svd(w, full_matrices=False)), "svd"


# --- rates and choice ------------------------------------------------------------------------------------------------


def _overlap(spectrum: Triplets | Half, a: Tensor, b: Tensor) -> Tensor:
    """u_iᵀ B A v_i (L, n)."""
    if isinstance(spectrum, Triplets):
        return ((spectrum.u.mT @ b) * (spectrum.vt @ a.mT)).sum(-1)
    if spectrum.left:  # vᵀ Aᵀ = uᵀ (W Aᵀ) / σ: the long side is not needed
        product = (spectrum.basis.mT @ b) * (spectrum.basis.mT @ (spectrum.w @ a.mT))
    else:
        product = (spectrum.basis.mT @ a.mT) * (spectrum.basis.mT @ (spectrum.w.mT @ b))
    return product.sum(-1) / spectrum.sigma.clamp_min(torch.finfo(spectrum.sigma.dtype).tiny)


def choose_best(
    spectrum: Triplets | Half, w: Tensor, a: Tensor, b: Tensor, s: int, scaling: float, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """u (L, N, s), vt (L, s, K), sigma, rate and index (L, s) of the highest rates."""
    rate = (scaling * _overlap(spectrum, a, b)).abs() / (spectrum.sigma + eps)
    best, local = rate.topk(s, dim=-1)
    sigma = spectrum.sigma.gather(-1, local)
    columns: Callable[[Tensor], Tensor] = lambda t: t.gather(-1, local[..., None, :].expand(*t.shape[:-1], s))  # noqa: E731
    if isinstance(spectrum, Triplets):
        u, v = columns(spectrum.u), columns(spectrum.vt.mT)
    else:
        near = columns(spectrum.basis)
        far = spectrum.other(near, sigma)
        u, v = (near, far) if spectrum.left else (far, near)
    index = local + (min(w.shape[-2:]) - spectrum.sigma.shape[-1])
    return u.contiguous(), v.mT.contiguous(), sigma, best, index
