"""The decomposition of one frozen weight in the form that is kept, and what is chosen from it later.

W never changes, so its singular triplets belong to no task: `decompose_to_keep` computes those that change rates are
measured at, `choose_directions` then takes the highest rates, which costs O((N + K) n r). What is kept is small: the last
n / 12 triplets, at most 128, of a graded square W in float32, or one orthogonal basis of the short side in half
precision, from which the triplets that are chosen are refined against W to full precision. Where W is too ill-conditioned
for that, all triplets are kept in float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .arguments import checked_batch, checked_weight
from .checks import norms_of
from .choice import Untouched, choice_holds, choose, highest_rates
from .decompose import decompose, in_order
from .decompositions import Decomposition, OneSided, TwoSided, chosen
from .linalg import full_precision
from .policy import routes_for
from .rates import Directions

# Times s candidates are refined before the s best of them are taken.
REFINED = 4


@dataclass(frozen=True)
class KeptDecomposition:
    """Singular triplets of a W (N, K), descending: sigma (n,) and u (N, n), vt (n, K), or one of the two.

    The route "tail" keeps the n smallest, the others all: both sides, or the basis of the short side alone in float16, of
    which the other side is W's product. Everything else is float32, float64 for a float64 W.
    """

    route: str
    sigma: Tensor
    u: Tensor | None
    vt: Tensor | None

    @property
    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors().values())

    def transposed(self) -> KeptDecomposition:
        """The triplets of Wᵀ."""
        u, vt = self.u, self.vt
        return KeptDecomposition(self.route, self.sigma, None if vt is None else vt.mT, None if u is None else u.mT)

    def fits(self, weight: Tensor) -> bool:
        """Are these floating tensors of the shapes that are kept of this weight (N, K)?"""
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
def decompose_to_keep(
    weight: Tensor,  # (..., N, K)
    method: str = "auto",
    generator: torch.Generator | None = None,
) -> list[KeptDecomposition]:
    """What is kept of each matrix of the flattened batch, by the routes of `task_specific_directions`.

    "auto" takes the tail of graded square matrices and all triplets of the others; "exact" all of every matrix.
    Deterministic for a given weight unless a generator is passed. Raises ValueError as `change_rates` does.
    """
    w = checked_weight(weight, method)
    # The tail of a flat spectrum, which rectangular weights have, holds too few directions to be worth keeping.
    if method == "randomized" and w.shape[-2] != w.shape[-1]:
        method = "auto"
    settled = decompose(w, routes_for(w, method), Untouched.choose, Untouched.holds, generator)
    kept = []
    for route, found, position in in_order(settled):
        u, sigma, vt = found.take([position]).compact(w.dtype)
        kept.append(KeptDecomposition(str(route), sigma, u, vt))
    return kept


@full_precision()
def choose_directions(
    kept: KeptDecomposition,
    weight: Tensor,  # (N, K)
    lora_a: Tensor,  # (r, K)
    lora_b: Tensor,  # (N, r)
    s: int = 8,
    *,
    scaling: float = 1.0,
    eps: float = 1e-6,
) -> Directions | None:
    """The s directions of highest change rate among those kept of this weight; unbatched.

    None where they fail the check of `task_specific_directions`: the tail was too short, or another weight's triplets were
    kept. Decompose with method="exact" then. Raises ValueError as `task_specific_directions` does.
    """
    w, a, b = checked_batch(weight[None], lora_a[None], lora_b[None], "auto")
    sigma = kept.sigma[None].to(w)
    if not 1 <= s <= sigma.shape[-1]:
        raise ValueError(f"s is {s}; the spectrum has {sigma.shape[-1]} directions")
    found: Decomposition
    if kept.u is not None and kept.vt is not None:
        found = TwoSided(kept.u[None].to(w), sigma, kept.vt[None].to(w))
    else:
        basis = kept.u if kept.vt is None else kept.vt.mT
        assert basis is not None
        rough = OneSided(w, basis[None].to(w), sigma, left=kept.vt is None)
        _, candidates = highest_rates(rough, a, b, min(sigma.shape[-1], REFINED * s), scaling, eps)
        found = refined(rough, candidates.sort(-1).values)
    choice = choose(found, a, b, s, scaling, eps)
    if not all(choice_holds(kept.route, w, norms_of(kept.route, w, sigma), sigma, choice)):
        return None
    u, vt, chosen_sigma, rate, index = (t[0] for t in choice)
    return Directions(u, vt, chosen_sigma, rate, index, (kept.route,))


def refined(rough: OneSided, which: Tensor) -> OneSided:
    """The triplets at the positions `which` (L, c) of a basis that is right to half precision, right to W's precision.

    One step of Ogita and Aishima (Japan J. Indust. Appl. Math. 2018) for those columns alone, O(n² c): the error of the
    basis, 3e-4 a column, is squared; eigenvalues that are equal to rounding are left as they are.
    """
    x, w = rough.basis, rough.w
    few = chosen(x, which)
    image = w @ (w.mT @ few) if rough.left else w.mT @ (w @ few)
    # In the paper's letters, `overlap` is R = I - XᵀX and `projected` S = XᵀGX.
    overlap = -(x.mT @ few)
    overlap.scatter_add_(-2, which[..., None, :], torch.ones_like(which, dtype=x.dtype)[..., None, :])
    projected = x.mT @ image
    own = overlap.gather(-2, which[..., None, :])
    values = (projected.gather(-2, which[..., None, :]) / (1 - own)).squeeze(-2)
    others = rough.sigma.square()
    others = others.scatter(-1, which, values)
    distance = values[..., None, :] - others[..., :, None]
    threshold = 4 * torch.finfo(torch.float32).eps * others[..., :1, None]
    correction = torch.where(
        distance.abs() > threshold, (projected + values[..., None, :] * overlap) / distance, overlap / 2
    )
    correction.scatter_(-2, which[..., None, :], own / 2)
    columns = few + x @ correction
    columns = columns / torch.linalg.vector_norm(columns, dim=-2, keepdim=True)
    sigma = values.clamp_min(0).sqrt()
    return OneSided(w, columns.to(x.dtype), sigma.to(rough.sigma.dtype), rough.left, positions=which)
