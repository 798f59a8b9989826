"""One route to the triplets of a batch, and what it found."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .decompositions import Decomposition, TwoSided, gram_decomposition
from .policy import Route, tail_power_iters
from .randomized_svd import batched_randomized_svd


@dataclass(frozen=True)
class Attempt:
    """What one route found for the matrices `which` of a batch: those that had nothing yet and whose spectrum allows it."""

    route: Route
    which: list[int]
    w: Tensor  # (L, N, K), these matrices
    norms: Tensor  # (L,), their largest σ
    found: Decomposition


def follow(route: Route, w: Tensor, generator: torch.Generator | None = None) -> Decomposition:
    """Triplets of w (L, N, K) by one route, in its precision."""
    if route.kind == "tail":
        generator = generator or torch.Generator(w.device).manual_seed(0)
        power_iters = tail_power_iters(min(w.shape[-2:]))
        return TwoSided(*batched_randomized_svd(w, route.rank, power_iters=power_iters, generator=generator))
    assert route.precision is not None
    if route.kind == "gram":
        return gram_decomposition(w, route.precision)
    return TwoSided(*torch.linalg.svd(w.to(route.precision), full_matrices=False))
