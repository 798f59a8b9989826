"""The decomposition of one frozen weight, computed before there is an update to measure, and what is chosen from it later.

W never changes, so its singular triplets belong to no task: `decompose` computes those that change rates are measured
at, `choose_directions` then takes the highest rates, which costs O((N + K) n r). A `Spectrum` is small enough to keep:
the last n / 12 triplets, at most 128, of a graded square W in float32, or one orthogonal basis of the short side in half
precision, from which the triplets that are chosen are refined against W to full precision. Where W is too ill-conditioned
for that, all triplets in float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .linalg import Triplets, full_precision, select
from .rates import Directions, checked_batch, choose_best
from .routes import (
    Half,
    are_orthonormal,
    are_resolved,
    are_triplets,
    follow,
    is_graded,
    norm_estimate,
    routes_of,
    tail_triplets,
)

MAX_HALF_CONDITION = 50.0  # of a W whose basis is kept in half precision; refined triplets fail their check from 100 on
REFINED = 4  # times s: so many candidates are refined before the s best are taken


@dataclass(frozen=True)
class Spectrum:
    """Singular triplets of a W (N, K), descending: sigma (n,) and u (N, n), vt (n, K), or one of the two.

    Route "tail": the n smallest. Others: all; both sides, or, float16, the short side's basis alone (the other side is W's
    product with it). Everything else is float32, float64 for a float64 W.
    """

    route: str
    sigma: Tensor
    u: Tensor | None
    vt: Tensor | None

    @property
    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.sigma, self.u, self.vt) if t is not None)

    def transposed(self) -> Spectrum:
        """Of Wᵀ."""
        u, vt = self.u, self.vt
        return Spectrum(self.route, self.sigma, None if vt is None else vt.mT, None if u is None else u.mT)

    def fits(self, weight: Tensor) -> bool:
        """Are these shapes of floating tensors those of a spectrum of this weight (N, K)?"""
        n, k = weight.shape
        count = self.sigma.shape[0] if self.sigma.dim() == 1 else 0
        shapes = {"sigma": (count,), "u": (n, count), "vt": (count, k)}
        whole = self.route == "tail" or count == min(n, k)
        sides = (self.u is not None) + (self.vt is not None)
        return (
            1 <= count <= min(n, k)
            and whole
            and (sides == 2 or (sides == 1 and self.route != "tail"))
            and all(t.shape == shapes[name] and t.is_floating_point() for name, t in self.tensors().items())
        )

    def tensors(self) -> dict[str, Tensor]:
        named = {"sigma": self.sigma, "u": self.u, "vt": self.vt}
        return {name: t for name, t in named.items() if t is not None}


@full_precision()
def decompose(
    weight: Tensor,  # (..., N, K)
    method: str = "auto",
    generator: torch.Generator | None = None,
) -> list[Spectrum]:
    """One `Spectrum` per matrix of the flattened batch, by the routes of `task_specific_directions`.

    "auto" takes the tail of graded square matrices and all triplets of the others; "exact" all of every matrix.
    Deterministic for a given weight unless a generator is passed. Raises ValueError as `change_rates` does.
    """
    *batch, n, k = weight.shape if weight.dim() >= 2 else (0, 0)
    zeros = weight.new_zeros(*batch, 1, 1)
    w, _, _ = checked_batch(weight, zeros.expand(*batch, 1, k), zeros.expand(*batch, n, 1), method)
    found: dict[int, Spectrum] = {}
    todo = list(range(w.shape[0]))
    if method != "exact" and w.shape[-2] == w.shape[-1] and todo:
        triplets = tail_triplets(w, None, generator)
        sound = is_graded(norm_estimate(w), triplets) & are_orthonormal(triplets.u, triplets.vt)
        keep = [True] * len(todo) if method == "randomized" else sound.tolist()
        for i in [i for i in todo if keep[i]]:
            found[i] = _both("tail", triplets.take([i]), w.dtype)
        todo = [i for i in todo if not keep[i]]
    for route in routes_of(w, method) if todo else ():
        full, allowed = follow(route, select(w, todo))
        for position in [p for p, ok in enumerate(allowed) if ok]:
            found[todo[position]] = _kept(str(route), full.take([position]), w.dtype)
        todo = [i for i in todo if i not in found]
        if not todo:
            break
    return [found[i] for i in range(w.shape[0])]


def _kept(route: str, full: Triplets | Half, dtype: torch.dtype) -> Spectrum:
    """What is kept of all triplets of one matrix, a batch of one."""
    if isinstance(full, Triplets):
        return _both(route, full, dtype)
    if not bool(full.sigma[0, 0] <= MAX_HALF_CONDITION * full.sigma[0, -1]):
        return _both(route, full.full(), dtype)
    basis = full.basis[0].half()
    sides = (basis.contiguous(), None) if full.left else (None, basis.mT.contiguous())
    return Spectrum(route, full.sigma[0].to(dtype), *sides)


def _both(route: str, triplets: Triplets, dtype: torch.dtype) -> Spectrum:
    u, sigma, vt = (t[0].to(dtype).contiguous() for t in triplets)
    return Spectrum(route, sigma, u, vt)


@full_precision()
def choose_directions(
    spectrum: Spectrum,
    weight: Tensor,  # (N, K)
    lora_a: Tensor,  # (r, K)
    lora_b: Tensor,  # (N, r)
    s: int = 8,
    *,
    scaling: float = 1.0,
    eps: float = 1e-6,
) -> Directions | None:
    """The s directions of highest change rate among those of a spectrum of this weight; unbatched.

    None where they fail the check of `task_specific_directions`: the tail was too short, or the spectrum is not this
    weight's. Decompose with method="exact" then.
    """
    w, a, b = checked_batch(weight[None], lora_a[None], lora_b[None], "auto")
    if not 1 <= s <= spectrum.sigma.shape[0]:
        raise ValueError(f"s is {s}; the spectrum has {spectrum.sigma.shape[0]} directions")
    sigma = spectrum.sigma[None].to(w)
    if spectrum.u is not None and spectrum.vt is not None:
        both = Triplets(spectrum.u[None].to(w), sigma, spectrum.vt[None].to(w))
        chosen = choose_best(both, w, a, b, s, scaling, eps)
    else:
        left = spectrum.u is not None
        basis = spectrum.u if left else spectrum.vt.mT  # type: ignore[union-attr]
        assert basis is not None
        chosen = _refined_choice(Half(w, basis[None].to(w), sigma, left), a, b, s, scaling, eps)
    if spectrum.route == "tail":
        good = all(are_resolved(w, norm_estimate(w), sigma, *chosen))
    else:
        good = all(are_triplets(w, sigma[..., 0], *chosen[:3]))
    if not good:
        return None
    u, vt, best_sigma, rate, index = (t[0] for t in chosen)
    return Directions(u, vt, best_sigma, rate, index, (spectrum.route,))


def _refined_choice(
    half: Half, a: Tensor, b: Tensor, s: int, scaling: float, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `choose_best`, from a basis in half precision: candidates are refined against W, then the s best are taken."""
    candidates = min(half.sigma.shape[-1], REFINED * s)
    index = choose_best(half, half.w, a, b, candidates, scaling, eps)[4].sort(-1).values
    near, sigma = _refine(half, index)
    few = Half(half.w, near, sigma, half.left)
    u, vt, best_sigma, rate, local = choose_best(few, half.w, a, b, s, scaling, eps)
    # `choose_best` counts from the end of the spectrum; these are positions among the candidates.
    position = local - (min(half.w.shape[-2:]) - candidates)
    return u, vt, best_sigma, rate, index.gather(-1, position)


def _refine(half: Half, index: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvectors (L, n, c) of the Gram matrix for some columns of a basis that is right to half precision, and their σ.

    One step of Ogita and Aishima (Japan J. Indust. Appl. Math. 2018) for those columns alone, O(n² c): the error of the
    basis, 3e-4 a column, is squared; eigenvalues that are equal to rounding are left as they are.
    """
    x, w = half.basis, half.w
    columns = index[..., None, :].expand(*x.shape[:-1], index.shape[-1])
    few = x.gather(-1, columns)
    image = w @ (w.mT @ few) if half.left else w.mT @ (w @ few)
    overlap = -(x.mT @ few)  # R = I - XᵀX
    overlap.scatter_add_(-2, index[..., None, :], torch.ones_like(index, dtype=x.dtype)[..., None, :])
    projected = x.mT @ image  # S = XᵀGX
    own = overlap.gather(-2, index[..., None, :])
    values = (projected.gather(-2, index[..., None, :]) / (1 - own)).squeeze(-2)
    others = half.sigma.square()
    others = others.scatter(-1, index, values)
    distance = values[..., None, :] - others[..., :, None]
    threshold = 4 * torch.finfo(torch.float32).eps * others[..., :1, None]
    correction = torch.where(
        distance.abs() > threshold, (projected + values[..., None, :] * overlap) / distance, overlap / 2
    )
    correction.scatter_(-2, index[..., None, :], own / 2)
    refined = few + x @ correction
    refined = refined / torch.linalg.vector_norm(refined, dim=-2, keepdim=True)
    return refined.to(half.basis.dtype), values.clamp_min(0).sqrt().to(half.sigma.dtype)
