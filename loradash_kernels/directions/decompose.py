"""The loop of attempts: route after route, until every matrix of a batch has triplets that pass their check."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from .attempts import Attempt, follow
from .checks import norms_of, spectrum_allows
from .linalg import select
from .policy import Route

T = TypeVar("T")


@dataclass(frozen=True)
class Settled(Generic[T]):
    """What came of one attempt: the matrices `which` of the batch lie at `positions` in `result`."""

    route: Route
    which: list[int]
    positions: list[int]
    result: T


def decompose(
    w: Tensor,  # (L, N, K)
    routes: Sequence[Route],
    choose: Callable[[Attempt], T],
    check: Callable[[Attempt, T], Sequence[bool]],
    generator: torch.Generator | None = None,
    together: bool = False,
) -> list[Settled[T]]:
    """Tries the routes in turn and settles what `choose` makes of each attempt, for the matrices that `check` accepts.

    Neither the spectrum nor the check stops the last route.

    Args:
        generator: of the tail's sketch; a fixed seed by default.
        together: settles all matrices by one route, or goes on to the next.
    """
    settled: list[Settled[T]] = []
    waiting = list(range(w.shape[0]))
    for route in routes:
        last = route is routes[-1]
        tried = select(w, waiting)
        found = follow(route, tried, generator)
        norms = norms_of(route.kind, tried, found.sigma)
        allowed = [True] * len(waiting) if last else spectrum_allows(route, found.sigma, norms)
        kept = [position for position, ok in enumerate(allowed) if ok]
        if (waiting and not kept) or (together and len(kept) < len(waiting)):
            continue
        which = [waiting[position] for position in kept]
        attempt = Attempt(route, which, select(w, which), select(norms, kept), found.take(kept))
        result = choose(attempt)
        good = [True] * len(which) if last else check(attempt, result)
        positions = [position for position, ok in enumerate(good) if ok]
        if together and len(positions) < len(which):
            continue
        settled.append(Settled(route, [which[position] for position in positions], positions, result))
        waiting = [i for i in waiting if i not in set(settled[-1].which)]
        if not waiting:
            break
    return settled


def in_order(settled: Sequence[Settled[T]]) -> Iterator[tuple[Route, T, int]]:
    """For each matrix of the batch: its route, and the result that holds it, at which position."""
    places = {i: (part, p) for part in settled for i, p in zip(part.which, part.positions, strict=True)}
    for i in sorted(places):
        part, position = places[i]
        yield part.route, part.result, position
